"""How a process of `taskvec` ends: not later than its work, whoever its libraries wait for."""

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_given_up = threading.Event()
_asked: list[int] = []


def heard() -> list[signal.Signals]:
    """Return the signals to stop that this process does not ignore, as it may below nohup."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def hear() -> None:
    """From now on raise KeyboardInterrupt at any signal to stop, and remember it.

    Some library may swallow what is raised while it is imported.
    """
    for number in heard():
        signal.signal(number, _interrupt)


def asked() -> int:
    """Return the first signal to stop that came, 0 if none did."""
    return _asked[0] if _asked else 0


def _interrupt(number: int, _: object) -> None:
    _asked.append(number)
    raise KeyboardInterrupt


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
