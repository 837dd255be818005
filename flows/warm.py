"""What the fork server imports once, so that a stage process starts in milliseconds."""

import importlib

from tasks.stages import NAMES

# Imported by a process that never computes: neither threads nor CUDA may start here.
for _name in NAMES:
    importlib.import_module(f"tasks.{_name}")
importlib.import_module("taskvec.models.open_clip")


def use_once() -> None:
    """Use libraries that put work off until then: a schema, a grammar, a picture."""
    from pandas import DataFrame

    from taskvec import expressions, pictures, tables

    curve = DataFrame({"step": [1], "loss": [1.0], "learning_rate": [1e-4]})
    tables.check(curve, tables.Training, "a curve")
    expressions.parse("c * a", ["a"], ["c"])
    pictures.losses({"a": curve}, "a", "a")


use_once()
