"""Whether the rendered files are still those of the present sources, told by one digest.

Rendering parses all code; a digest over the same bytes takes milliseconds. The digest lies in
.taskvec/ and is no truth: without it everything is rendered and compared anew.
"""

import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

from flows import plan
from tasks.artifacts import Artifacts


def is_fresh(root: Path) -> bool:
    """Return whether sources and rendered files are those of the last `remember`."""
    mark = _mark(root)
    return mark.is_file() and mark.read_text() == _digest(root)


def remember(root: Path) -> None:
    """Note that the rendered files belong to the present sources."""
    mark = _mark(root)
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(_digest(root))


def _mark(root: Path) -> Path:
    return root / ".taskvec" / "rendered"


def _digest(root: Path) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in plan.PACKAGES:
        digest.update(version(name).encode())
    rooms = [plan.SOURCES / room for room in ("flows", "taskvec", "tasks")]
    code = [path for room in rooms for path in room.rglob("*.py")]
    top = Artifacts(root).top
    own = [root / "params.yaml", top / "dvc.yaml", top / ".dvc/config", *plan.rendered(root)]
    digest.update("\n".join(plan.study_texts(root)).encode())
    # Without the directory of the checkout: a copy of it is as fresh.
    for base, paths in ((plan.SOURCES, [*sorted(code), plan.TEMPLATE]), (top, own)):
        for path in paths:
            digest.update(f"{path.relative_to(base)}\n".encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
