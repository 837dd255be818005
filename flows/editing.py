"""What the commands `edit`, `merge`, `similarity` and `import` do."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskvec.errors import InvalidInput

SPLITS = ("validation", "test")


def edit(
    root: Path,
    expression: str,
    at: Sequence[str],
    out: Path,
    seed: int | None,
    evaluate_on: Sequence[str] | None,
    split: str,
) -> None:
    """Write an edited model, evaluate it if asked, and record it as any other edit."""
    from flows.recording import Tracker
    from tasks import ad_hoc
    from tasks.artifacts import Artifacts
    from taskvec import expressions
    from taskvec import params as parameters

    params = parameters.load(root / "params.yaml")
    coefficients = values(at)
    recipe = expressions.parse(expression, params.tasks, coefficients)
    tasks = _tasks(evaluate_on, params)
    if split not in SPLITS:
        raise InvalidInput(f"split {split!r}; expected {' or '.join(SPLITS)}")
    artifacts = Artifacts(root)
    chosen = params.seeds[0] if seed is None else seed
    read = ad_hoc.edit(artifacts, recipe, coefficients, chosen, out, Line("edit"))
    _say(f"{out}: theta_0 + {recipe}" + "".join(f", {k} = {v:g}" for k, v in coefficients.items()))
    metrics: dict[str, float] = {}
    if tasks:
        from taskvec.numeric import make_deterministic

        make_deterministic()
        table = ad_hoc.evaluate(artifacts, params, out, tasks, split, Line("evaluate"))
        metrics = {
            f"{split}.accuracy.{row['task']}": row["correct"] / row["items"]
            for row in table.to_dict("records")
            if row["model"] == "edit"
        }
        _print_accuracies(table, split)
    tracker = Tracker(root, _say)
    tracker.start({"name": "taskvec edit", "seed": str(chosen)})
    tracker.edited(out, list(read.values()), metrics)
    tracker.close("FINISHED")


def values(at: Sequence[str]) -> dict[str, float]:
    """Return ``["a=0.3", "b=1,c=2"]`` as numbers.

    Raises:
        InvalidInput: one is malformed, not finite or given twice.
    """
    found: dict[str, float] = {}
    for part in (item.strip() for text in at for item in text.split(",")):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not name or not math.isfinite(value):
            raise InvalidInput(f"--at {part!r}: expected a coefficient and a number, such as c=0.4")
        if name in found:
            raise InvalidInput(f"--at gives {name!r} twice")
        found[name] = value
    return found


def similarity(
    root: Path, names: Sequence[str], seed: int | None, plot: Path | None, as_json: bool
) -> None:
    """Print and draw the cosines of task vectors, whole and layer by layer."""
    from rich.console import Console

    from tasks.artifacts import Artifacts
    from tasks.combine import stored_vectors
    from tasks.inputs import mapped
    from taskvec import params as parameters
    from taskvec import pictures
    from taskvec.atomic import write_text
    from taskvec.similarity import cosines, cosines_by_layer

    params = parameters.load(root / "params.yaml")
    artifacts = Artifacts(root)
    tasks = _tasks(names, params)
    if len(tasks) < 2:
        raise InvalidInput(f"similarity compares two or more task vectors, found {len(tasks)}")
    chosen = params.seeds[0] if seed is None else seed
    vectors = stored_vectors(
        {task: mapped(artifacts.vector(task, chosen), "vector") for task in tasks}
    )
    whole, layers = cosines(vectors), cosines_by_layer(vectors)
    target = plot or artifacts.similarity(chosen)
    title = f"cosine similarity of {len(tasks)} task vectors, seed {chosen}"
    figures = {
        "whole": pictures.heat_map(whole, "whole", title),
        "by layer": pictures.layer_map(layers, "layers", f"{title}, layer by layer"),
    }
    write_text(target, _page(title, figures))
    if as_json:
        content = {"whole": whole.to_dict(), "by layer": layers.to_dict("index")}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(_table(whole, title, ""))
    console.print(_table(layers.T, "layer by layer", "pair"))
    console.print(f"picture: {target}", soft_wrap=True, markup=False)


def merge(config: Path, out: Path, fingerprints: bool) -> None:
    """Run a mergekit configuration as it stands."""
    # numpy's BLAS is not used here, and its threads take time to start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from taskvec import mergekit
    from taskvec.allocation import keep_freed_memory

    keep_freed_memory()
    line = Line("merge")
    mark = mergekit.merge(
        config,
        out,
        fingerprints=fingerprints,
        progress=lambda done, total: line({"step": done, "steps": total}),
        warn=lambda text: _say(f"warning: {text}"),
    )
    _say(f"{out}: fingerprint {mark}")


def import_legacy(path: Path, out: Path) -> None:
    """Convert a checkpoint of the paper's code, a whole pickled module."""
    from taskvec import pickles

    mark = pickles.import_legacy(path, out)
    _say(f"{out}: fingerprint {mark}")


class Line:
    """One line on stderr that shows how far something is, if anybody looks."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = -1

    def __call__(self, progress: dict[str, float]) -> None:
        """Show how far it is."""
        share = int(100 * progress["step"] / max(1, progress["steps"]))
        if share != self._shown and sys.stderr.isatty():
            self._shown = share
            sys.stderr.write(f"\r{self._what} {share:3} %")
            if share == 100:
                sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _tasks(names: Sequence[str] | None, params: Any) -> list[str]:
    from taskvec.errors import nearest

    for name in names or ():
        if name not in params.tasks:
            raise InvalidInput(f"unknown task {name!r}; {nearest(name, params.tasks)}")
    return [] if names is None else list(names) or list(params.tasks)


def _print_accuracies(table: Any, split: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from taskvec.metrics import wilson_interval

    shown = Table(title=f"accuracy on {split} data in %", title_justify="left")
    for column in ("task", "pretrained", "edit", "95 % interval"):
        shown.add_column(column, justify="left" if column == "task" else "right")
    for task, rows in table.groupby("task", sort=False):
        counts = {row["model"]: (row["correct"], row["items"]) for row in rows.to_dict("records")}
        low, high = wilson_interval(*counts["edit"])
        shares = [f"{100 * right / items:.1f}" for right, items in counts.values()]
        shown.add_row(str(task), *shares, f"{100 * low:.1f} to {100 * high:.1f}")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(shown)


def _table(frame: Any, title: str, corner: str) -> Any:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    shown.add_column(corner)
    for column in frame.columns:
        shown.add_column(str(column).removeprefix("layer "), justify="right")
    for name, row in frame.iterrows():
        shown.add_row(str(name), *(f"{value + 0.0:.3f}" for value in row))
    return shown


def _page(title: str, figures: dict[str, str]) -> str:
    parts = "".join(f"<h2>{name}</h2>\n{svg}\n" for name, svg in figures.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title>\n<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;"
        "margin:2rem auto;padding:0 1rem}svg{max-width:100%;height:auto}</style></head>\n"
        f"<body><h1>{title}</h1>\n{parts}</body></html>\n"
    )
