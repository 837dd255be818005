"""docs/results.md: the pages of all studies as one document."""

import re
from collections.abc import Mapping, Sequence

from tasks.results import MARK

INTERVALS = """Round brackets hold 95 % intervals, square brackets the range over seeds.

- Accuracies have Wilson intervals over test items. Intervals of differences (Newcombe's hybrid
  score), ratios (Donner and Zou) and means are built from their bounds. They take two models as
  independent although both see the same items, which makes them rather too wide. All seeds see the
  same test items, so that the bounds of several seeds are averaged and do not narrow.
- A mean over edits (pairs, targets, sub-populations) or over seeds has Student's t interval; it
  says how the mean would move with other edits or seeds, not with other items. Edits that share
  tasks are not independent, which makes these intervals rather too narrow.
- Correlations have percentile bootstrap intervals over pairs, with 2000 resamples.
- None covers the choice of the coefficient, which validation data makes, or of the tasks. Test
  data chooses nothing. A seed decides the order of the batches, not the items.
- A sentence in bold says that something shows only if its whole interval does; else it says that
  nothing is shown."""

DATA = """MNIST and USPS (digits), notMNIST (letters), Fashion-MNIST (clothes), CIFAR-10 (objects),
GTSRB (traffic signs), RSSCN7 (aerial scenes) and PACS (photos, sketches, cartoons), packed once and
read through `--data-root`; each study records the name and the sha256 of every file. Studies take
a part of each set: see `experiments/NAME/params.yaml`.

The base model is small, and it is not CLIP: an EfficientNet-lite0 tower whose output is aligned
with the text tower of MiniLM on three labelled pictures a class. So it is a few-shot model, not a
zero-shot one, and no figure here is a reproduction of the paper's: what may be compared is whether
a phenomenon shows, and about how large it is."""


def collect(texts: Mapping[str, str], cut: Sequence[str]) -> str:
    """Return the pages of studies as one document for docs/.

    Args:
        texts: name of the experiment -> its results.md, in the order to show them.
        cut: a sentence for everything that was left out to fit the time.
    """
    pages = {name: _placed(name, text) for name, text in texts.items()}
    contents = [
        f"- [{_title(page)}](#{_anchor(_title(page))}): {_verdict(page)}"
        for page in pages.values()
    ]  # fmt: skip
    cuts = "\n".join(f"- {sentence}" for sentence in cut) or "Nothing."
    parts = [
        MARK,
        "# Results of the studies",
        "Each study repeats an experiment of arXiv:2212.04089 on real data; "
        "`taskvec run --experiment NAME` runs one.",
        "\n".join(contents),
        f"## How the intervals are made\n\n{INTERVALS}",
        f"## Data and model\n\n{DATA}",
        f"## What was cut to fit the time\n\n{cuts}",
        *pages.values(),
    ]
    return "\n\n".join(parts) + "\n"


def _placed(name: str, text: str) -> str:
    """Return a page with its links made relative to docs/."""
    page = text.replace(MARK, "", 1).strip()
    return re.sub(r"\]\(figures/", f"](../experiments/{name}/figures/", page)


def _title(page: str) -> str:
    return page.partition("\n")[0].removeprefix("## ")


def _verdict(page: str) -> str:
    return page.split("\n\n")[1].strip("*")


def _anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
