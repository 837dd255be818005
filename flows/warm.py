"""What the fork server imports once, so that a stage process starts in milliseconds."""

import importlib

from tasks.stages import NAMES

# Imported by a process that never computes: neither threads nor CUDA may start here.
for _name in NAMES:
    importlib.import_module(f"tasks.{_name}")
importlib.import_module("taskvec.models.open_clip")
