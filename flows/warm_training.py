"""What the fork server imports beside flows/warm.py if a stage trains.

Torch imports it at the first step of an optimizer. It takes a second, which other runs need not
spend.
"""

import gc
import importlib

importlib.import_module("torch._inductor.config")
gc.freeze()
