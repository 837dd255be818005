"""What a person sees: progress on stderr while stages run, a table of results on stdout."""

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flows.nodes import Listener, Node, Outcome

if TYPE_CHECKING:
    from tasks.stages import Progress


class Terminal:
    """A line for every finished stage, and bars for running ones if stderr is a terminal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}
        self._done = 0
        self._stages = 0
        self._console: Any = None
        self._progress: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def listener(self) -> Listener:
        """Return the callbacks for the flow."""
        return Listener(self._planned, self._started, self._moved, self._finished, self._note)

    def _planned(self, stages: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._stages = stages
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._total = self._progress.add_task("all stages", total=stages, figures="")

    def _started(self, node: Node) -> None:
        with self._lock:
            self._bars[node.address] = self._progress.add_task(node.name, total=None, figures="")

    def _moved(self, node: Node, progress: "Progress") -> None:
        figures = "  ".join(
            f"{name} {value:.4g}"
            for name, value in progress.items()
            if name not in ("step", "steps")
        )
        with self._lock:
            bar = self._bars[node.address]
            self._progress.update(
                bar, completed=progress["step"], total=progress["steps"], figures=figures
            )

    def _finished(self, node: Node, outcome: Outcome) -> None:
        with self._lock:
            self._done += 1
            if node.address in self._bars:
                self._progress.remove_task(self._bars.pop(node.address))
            self._progress.update(self._total, completed=self._done)
            took = f"{outcome.seconds:6.1f} s" if outcome.seconds else " " * 8
            line = f"[{self._done:3}/{self._stages}] {took}  {outcome.how:10} {node.name}"
            self._console.print(line, markup=False)

    def _note(self, text: str) -> None:
        self._console.print(text, markup=False)


def print_results(root: Path) -> None:
    """Print test accuracies of all models, from the evaluation tables of the first seed."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from tasks.artifacts import Artifacts
    from taskvec import params as parameters
    from taskvec.errors import MissingArtifact

    params = parameters.load(root / "params.yaml")
    artifacts, seed = Artifacts(root), params.seeds[0]
    if not artifacts.report().is_file():
        raise MissingArtifact("there are no results yet; `taskvec run` makes them")
    tables = [
        pd.read_csv(artifacts.evaluation(name, seed)) for name in (*params.tasks, *params.edits)
    ]
    rows = pd.concat(tables).query("split == 'test'")
    grid = rows.pivot_table(index="model", columns="task", values="accuracy", sort=False) * 100
    means = rows.groupby("model")["normalized"].mean() * 100
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=f"accuracy on test data in %, seed {seed}", title_justify="left")
    table.add_column("model")
    for task in params.tasks:
        table.add_column(task, justify="right")
    table.add_column("mean normalised", justify="right")
    for model in ("pretrained", "finetuned", *params.edits):
        cells = [grid[task].get(model, float("nan")) for task in params.tasks]
        several = sum(cell == cell for cell in cells) > 1
        table.add_row(
            model,
            *(f"{cell:.1f}" if cell == cell else "" for cell in cells),
            f"{means[model]:.1f}" if several else "",
        )
    console.print(table)
    console.print(f"report: {artifacts.report()}", soft_wrap=True)
