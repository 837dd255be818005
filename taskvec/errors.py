"""Every error a user can cause, each with the exit code of the command line.

TaskvecError (1)
├── InvalidInput (3)            a file, a parameter or an expression is not what it must be
│   ├── InvalidParams           params.yaml, with the line
│   ├── InvalidExpression       an edit's expression, with the place
│   ├── InvalidData             a data file or a table
│   └── IncompatibleWeights     another origin, missing keys, other shapes or dtypes, NaN
├── StaleRendering (3)          dvc.yaml, edits/dvc.yaml or code.yaml do not match the sources
├── MissingDependency (3)       an optional package is not installed
├── MissingArtifact (5)         a file that a stage needs is not there
├── Busy (6)                    somebody else holds the checkout
├── ServiceUnreachable (7)      a server that was asked for does not answer
├── GateClosed (8)              a checkpoint or test data is not to be trusted
└── Interrupted (130, 143)      Ctrl-C or SIGTERM

A message says what was found, what was expected and what to do. Exit code 4 is no error but an
answer: what `verify` or `reproduce` looked at is not what the record says.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TaskvecError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_code = 1


class InvalidInput(TaskvecError):
    """Something the user wrote or supplied is not what it must be."""

    exit_code = 3


class InvalidParams(InvalidInput):
    """params.yaml holds a value of the wrong type, an unknown key or an impossible combination."""


class InvalidExpression(InvalidInput):
    """An edit's expression cannot be read, or is not linear in its coefficients."""


class InvalidData(InvalidInput):
    """A data file has another digest than declared, or a table breaks its schema."""


class IncompatibleWeights(InvalidInput):
    """Weights that cannot be combined: origin, names, shapes, dtypes or values differ."""


class StaleRendering(TaskvecError):
    """A rendered file does not match the parameters or the code."""

    exit_code = 3


class MissingDependency(TaskvecError):
    """An optional package is not installed."""

    exit_code = 3


class MissingArtifact(TaskvecError):
    """A file that is needed does not exist."""

    exit_code = 5


class Busy(TaskvecError):
    """Another process works in this checkout."""

    exit_code = 6


class ServiceUnreachable(TaskvecError):
    """A server does not answer."""

    exit_code = 7


class GateClosed(TaskvecError):
    """A checkpoint does not reproduce its score, or test data was trained on."""

    exit_code = 8


class Interrupted(TaskvecError):
    """The user or the system asked the run to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted; the same command goes on where this stopped")
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'mnist'? known: digits, mnist``."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
