"""What a process that does several searches keeps between them: the base model and bases of edits.

Something kept is used again only while its file is the same, by inode, size and time of change, and
by one user at a time: a tower that is being edited is nobody else's.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.artifacts import Artifacts
from tasks.inputs import architecture, checkpoint
from taskvec.checkpoints import Weights, load
from taskvec.sections import Model
from taskvec.towers import Tower

BASES = 4  # of edits; the memory that a base takes is one model a coefficient

State = tuple[str, int, int, int]

_towers: dict[tuple[State, str], tuple[Tower, Weights]] = {}
_bases: OrderedDict[State, Weights] = OrderedDict()


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


def _state(path: Path) -> State:
    if not path.exists():
        return str(path), 0, 0, 0  # whoever loads it says what is missing
    state = path.stat()
    return str(path), state.st_ino, state.st_size, state.st_mtime_ns
