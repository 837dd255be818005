"""What the fork server imports beside flows/warm.py if a stage trains: torch does at its first step.

It takes a second, which a run without such a stage need not spend.
"""

import gc
import importlib

importlib.import_module("torch._inductor.config")
gc.freeze()
