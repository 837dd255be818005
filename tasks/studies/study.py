"""The page of a study: its verdict, tables and pictures, and the files that they become."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.artifacts import Artifacts
from tasks.results import MARK
from taskvec.atomic import write_text
from taskvec.study_pictures import standalone


@dataclass(frozen=True)
class Study:
    """What a study shows.

    Attributes:
        title: of the page.
        verdict: one sentence: whether the paper's phenomenon shows, with the figure that says so.
        body: Markdown with pictures as ``![caption](figures/NAME.svg)``.
        figures: NAME -> one ``<svg>`` element.
    """

    title: str
    verdict: str
    body: str
    figures: Mapping[str, str]

    def text(self) -> str:
        """Return the page as Markdown."""
        return f"{MARK}\n\n## {self.title}\n\n**{self.verdict}**\n\n{self.body.strip()}\n"


def write(artifacts: Artifacts, study: Study) -> None:
    """Write the page and its pictures; the directory of pictures is replaced as a whole."""
    figures = artifacts.study_figures()
    figures.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=figures.parent) as directory:
        made, old = Path(directory) / "new", Path(directory) / "old"
        made.mkdir()
        for name, svg in study.figures.items():
            write_text(made / f"{name}.svg", standalone(svg))
        if figures.exists():
            figures.rename(old)
        made.rename(figures)
        shutil.rmtree(old, ignore_errors=True)
    write_text(artifacts.study_text(), study.text())


def picture(caption: str, name: str) -> str:
    """Return a picture of the page as Markdown."""
    return f"![{caption}](figures/{name}.svg)"
