"""What a process that does several stages keeps between them.

For searches the base model and bases of edits, for reports what they read and draw. Something kept
is used again only while its files are the same, by inode, size and time of change, and a tower by
one user at a time: one that is being edited is nobody else's.
"""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint
from taskvec.checkpoints import Weights, load
from taskvec.sections import Model
from taskvec.towers import Tower

BASES = 4  # of edits; the memory that a base takes is one model a coefficient
MADE = 1000  # tables and figures of reports

State = tuple[str, int, int, int]
T = TypeVar("T")

_towers: dict[tuple[State, str], tuple[Tower, Weights]] = {}
_bases: OrderedDict[State, Weights] = OrderedDict()
_made: OrderedDict[tuple[str, tuple[State, ...]], object] = OrderedDict()


@contextmanager
def base_model(artifacts: Artifacts, model: Model) -> Iterator[tuple[Tower, Weights]]:
    """Yield a tower whose weights do not matter, and theta_pre, which fits it.

    After an error the tower is not kept.
    """
    path = artifacts.pretrained()
    key = _state(path), model.model_dump_json()
    found = _towers.pop(key, None)
    _towers.clear()  # another base model is not kept beside this one
    if found is None:
        tower = architecture(model)
        found = tower, checkpoint(path, tower)
    yield found
    _towers.clear()
    _towers[key] = found


def basis(artifacts: Artifacts, edit: str, seed: int) -> Weights:
    """Return the vectors of an edit; nobody changes them."""
    path = artifacts.basis(edit, seed)
    state = _state(path)
    found = _bases.pop(state, None) or load(path, "basis")
    _bases[state] = found
    while len(_bases) > BASES:
        _bases.popitem(last=False)
    return found


def once(make: Callable[..., T], *arguments: Any, files: Sequence[Path] = (), **named: Any) -> T:
    """Return what a function makes of its arguments; nobody changes it.

    Args:
        make: depends on nothing but arguments and files.
        *arguments: values that can be pickled.
        files: that it reads.
        **named: as ``arguments``.
    """
    stated = pickle.dumps((make, arguments, named))  # never read again
    key = hashlib.sha256(stated).hexdigest(), tuple(_state(path) for path in files)
    found = _made.pop(key, None)
    made: T = make(*arguments, **named) if found is None else found  # type: ignore[assignment]
    _made[key] = made
    while len(_made) > MADE:
        _made.popitem(last=False)
    return made


def _state(path: Path) -> State:
    if not path.exists():
        return str(path), 0, 0, 0  # whoever loads it says what is missing
    state = path.stat()
    return str(path), state.st_ino, state.st_size, state.st_mtime_ns
