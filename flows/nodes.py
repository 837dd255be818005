"""What the flow is told of a stage, and what it tells: values alone, which import nothing heavy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.stages import Progress


@dataclass(frozen=True)
class Reason:
    """Why a stage is stale: a kind to filter by, and words."""

    kind: str  # never run, params, code, data, output, command, retracted, upstream
    words: str


@dataclass
class Node:
    """A stage of the graph, as the flow and the reports see it.

    Attributes:
        name: as DVC prints it, without the file: ``fine_tune@mnist-0``, ``search-addition-0``.
        address: as DVC addresses it: ``edits/dvc.yaml:search-addition-0``.
        command: constant string ``python -m tasks STAGE [ITEM]``.
        gpus: devices that the stage wants.
        timeout: seconds after which it is killed.
        upstream: addresses of the stages that it depends on.
        deps: paths of its file dependencies, relative to the root.
        outs: paths of its outputs, relative to the root.
        params: declared parameters with their present values, flat.
        reasons: why it is stale; empty if it is not.
        meta: what dvc.yaml says of it under meta.
    """

    name: str
    address: str
    command: str
    gpus: int
    timeout: float
    upstream: list[str]
    deps: list[str]
    outs: list[str]
    params: dict[str, Any] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """The name of the stage's module in tasks/."""
        return (self.command.split() + [""] * 4)[3]

    @property
    def item(self) -> str:
        """What the stage works on; may be empty."""
        return (self.command.split() + [""] * 5)[4]


@dataclass
class Outcome:
    """What became of one stage.

    Attributes:
        how: run, run-cache, unchanged, failed or "not run".
        seconds: wall time, for people; never part of an artifact.
        error: the failure in words.
        exit_code: of the failure.
    """

    name: str
    how: str
    seconds: float = 0.0
    error: str = ""
    exit_code: int = 0


@dataclass
class Listener:
    """Whom the flow tells what happens; called from any thread.

    Attributes:
        planned: is told once how many stages may run, before anything else.
        started: a stage begins.
        progress: how far it is.
        finished: what became of it.
        note: something for people.
        stoppable: is given what stops the run, which takes the number of a signal.
    """

    planned: Callable[[int], None] = lambda stages: None
    started: Callable[[Node], None] = lambda node: None
    progress: Callable[[Node, "Progress"], None] = lambda node, progress: None
    finished: Callable[[Node, Outcome], None] = lambda node, outcome: None
    note: Callable[[str], None] = lambda text: None
    stoppable: Callable[[Callable[[int], None]], None] = lambda stop: None
