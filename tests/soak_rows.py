"""The rows of docs/reliability.md: what is done to what, what must hold, and how often."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests import soak_beside, soak_runs, soak_servers, soak_signals

# How many trials there were, and what went wrong; empty if nothing did
Trial = Callable[[random.Random], tuple[int, str]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: as in the argument.
        what: is done to what.
        must: hold.
        target: how many trials.
        note: how many trials until they are counted: a row may be cut off at any time.
    """

    name: str
    what: str
    must: str
    target: int
    note: int = 50


AS_IF = "the next run ends as if nothing had happened"

ROWS = {
    row.name: row
    for row in (
        Row(
            "bytes",
            "one bit, a page of zeros, a cut or a swap of cached objects, mode and times kept",
            "`verify` names the file",
            2000,
        ),
        Row(
            "records",
            "an edit of a lock entry, of the log of runs, of a header or of MLflow's rows",
            "`verify` names the entry",
            1000,
        ),
        Row("clean", "nothing", "`verify` is silent", 200),
        Row(
            "rebuild",
            "another directory, TZ, locale, umask, hash seed and core",
            "`reproduce` gives the same bits",
            20,
            note=1,
        ),
        Row(
            "race",
            "two processes write the same weights and enter logs into the same list, at once",
            "readers see a whole file, no line is lost or torn",
            100,
        ),
        Row(
            "kill",
            "kill -9 of all processes of runs in a row, at boundaries of stages or at any moment",
            AS_IF,
            500,
            note=1,
        ),
        Row(
            "orphan",
            "kill -9 of the drivers of runs in a row, half of the time with stages frozen",
            AS_IF,
            100,
            note=1,
        ),
        Row(
            "prefect",
            "Prefect's server is down, hangs for 25 s, is killed, or comes back, at any moment",
            f"the run ends well, or with exit code 7 within 30 s; then {AS_IF}",
            40,
            note=1,
        ),
        Row(
            "together",
            "a second run, `run --wait`, `dvc gc`, `verify` or `status` beside a run",
            f"the second waits, or ends within 5 s with exit code 6; {AS_IF}",
            100,
            note=1,
        ),
        Row(
            "signals",
            "Ctrl-C, Ctrl-C twice, SIGTERM, SIGHUP, or `head` as the reader, at any moment",
            f"130, 143, 129 or 0 within 5 s; then {AS_IF}",
            100,
            note=1,
        ),
    )
}


RUNS: dict[str, Callable[[soak_runs.Runs, random.Random], tuple[int, str]]] = {
    "kill": soak_runs.killed,
    "orphan": soak_runs.orphaned,
    "prefect": lambda runs, draw: (1, soak_servers.unserved(runs, draw)),
    "together": lambda runs, draw: (1, soak_beside.together(runs, draw)),
    "signals": lambda runs, draw: (1, soak_signals.signalled(runs, draw)),
}
