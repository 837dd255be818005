"""How a process of `taskvec` ends: not later than its work, whoever its libraries wait for."""

import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_given_up = threading.Event()


def give_up() -> None:
    """Note that some thread waits for a server that does not answer, and need not be waited for.

    Prefect, for one, tries to deliver every event before the interpreter may end: for minutes.
    """
    _given_up.set()


def given_up() -> bool:
    """Return whether some thread waits in vain."""
    return _given_up.is_set()


def leave(code: int) -> NoReturn:
    """End the process; at once if a thread was given up."""
    if given_up():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
