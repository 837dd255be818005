"""Make torchvision importable beside a torch build that its own library does not fit.

With a CPU build of torch and a CUDA build of torchvision, `import torchvision` raises
"operator torchvision::nms does not exist", although nothing here uses that operator. Declaring the
two schemas is enough. Import this module before open_clip or timm.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_missing_operators() -> None:
    """Declare torchvision's operators if its compiled library cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)


_keep_alive: list[torch.library.Library] = []
declare_missing_operators()
