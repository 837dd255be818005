"""What the fork server imports once, so that a stage process starts in milliseconds.

The fork server begins in the directory of params.yaml, and imports the model family of that alone:
a family may need a library that takes seconds.
"""

import gc
import importlib
import signal
from contextlib import suppress
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
gc.disable()  # nothing of what follows is garbage, and looking for it takes a quarter of the time

import psutil  # noqa: E402
from pandas import DataFrame  # noqa: E402

from flows.locking import mark_stages  # noqa: E402
from tasks.stages import NAMES  # noqa: E402
from taskvec import expressions, params, pictures, plugins, tables  # noqa: E402
from taskvec.errors import TaskvecError  # noqa: E402

# Imported by a process that never computes: neither threads nor CUDA may start here.
for _name in NAMES:
    importlib.import_module(f"tasks.{_name}")


def use_once() -> None:
    """Use libraries that put work off until then: a schema, a grammar, a picture."""
    curve = DataFrame({"step": [1], "loss": [1.0], "learning_rate": [1e-4]})
    tables.check(curve, tables.Training, "a curve")
    expressions.parse("c * a", ["a"], ["c"])
    pictures.losses({"a": curve}, "a", "a")


use_once()
with suppress(TaskvecError, OSError):  # the stage says what is wrong
    plugins.load("models", params.load(Path("params.yaml")).model.family)
with suppress(OSError, psutil.Error):
    mark_stages(Path.cwd())
gc.freeze()  # a stage that collected what it inherits would copy it
gc.enable()
