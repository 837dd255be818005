"""How a batch goes through the tower and its gradient comes back.

In which precision, compiled or not, in pieces of how many items, on how many devices: none of it
changes what is computed by more than rounding.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from taskvec.errors import InvalidInput, MissingDependency, TaskvecError
from taskvec.parallel import Alone, Group
from taskvec.sections import FineTune
from taskvec.towers import Tower

# How torch on a CPU, oneDNN and the libraries of CUDA say that there is not enough memory; oneDNN
# says the same of other failures, which then fail again with fewer items.
FULL = (
    "can't allocate memory", "not enough memory", "could not create a primitive",
    "STATUS_ALLOC_FAILED",
)  # fmt: skip


class OutOfMemory(TaskvecError):
    """A step does not fit into the memory, also with half of the items at once."""


class Passage:
    """The way of every batch of one training.

    Attributes:
        micro_batch: how many items go through the tower at once in this process; None: all that
            the process has of a batch.
        halved_at: the step that did not fit into the memory, so that ``micro_batch`` was halved.
    """

    def __init__(self, tower: Tower, recipe: FineTune, group: Group | None = None) -> None:
        """Take what trains.

        Args:
            tower: what is trained.
            recipe: how.
            group: the processes that train it together.

        Raises:
            InvalidInput: the device cannot compute in the recipe's precision.
            MissingDependency: torch.compile does not work on this machine.
        """
        check(recipe, tower.device)
        self.micro_batch = recipe.micro_batch
        self.halved_at: int | None = None
        self._reason = "another process has too little"  # unless this one says why
        self._group = group or Alone()
        self._recipe = recipe
        self._device = tower.device
        self._tower = replace(tower, module=_prepared(tower, recipe))

    def features(self, images: Tensor) -> Tensor:
        """Return unit features (N, D) float32 of uint8 pictures (N, 3, S, S)."""
        return self._tower.features(images)

    def gradient(
        self,
        number: int,
        batch: Tensor,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        sign: float = 1.0,
    ) -> Tensor:
        """Leave the gradient of a batch's loss in the parameters and return the loss.

        If there is not enough memory, everything is computed again with half of the items at once.

        Args:
            number: of the step.
            batch: positions, the same in all processes.
            parameters: their gradients are replaced, nothing else changes.
            loss: positions -> their part of the batch's mean loss.
            sign: what the loss is multiplied by before it is derived.

        Raises:
            OutOfMemory: half of the items do not fit either, or were tried before.
        """
        while True:
            own = self._attempt(self._group.share(batch), parameters, loss, sign)
            total = self._group.total(parameters, own)
            if total is not None:
                return total
            self._halve(number, -(-len(batch) // self._group.size))

    def record(self) -> dict[str, Any]:
        """Return what the header of the result says: how it was trained, if not as usual."""
        unusual: dict[str, Any] = {}
        if self._recipe.precision != "float32":
            unusual["precision"] = self._recipe.precision
        if self._recipe.compile:
            unusual["compile"] = True
        if self.micro_batch:
            unusual["micro_batch"] = self.micro_batch
        if self.halved_at:
            unusual["halved_at"] = self.halved_at
        if self._group.size > 1:
            unusual["processes"] = self._group.size
        return {"training": unusual} if unusual else {}

    def _attempt(
        self,
        share: Tensor,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        sign: float,
    ) -> Tensor | None:
        """Leave the gradient of a share; return its loss, or None for want of memory."""
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self._device)
        try:
            for piece in share.split(self.micro_batch or max(1, len(share))):
                if len(piece):
                    part = loss(piece)
                    (sign * part).backward()
                    total += part.detach()
            return total
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = (str(error).splitlines() or [type(error).__name__])[0]
        # Not before the error is forgotten: its frames hold what is to be freed.
        for parameter in parameters:
            parameter.grad = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _halve(self, number: int, share: int) -> None:
        tried = min(self.micro_batch or share, share)
        if self.halved_at or tried == 1:
            before = f", after it was halved at step {self.halved_at}" if self.halved_at else ""
            lower = f"set fine_tune.micro_batch below {tried}, or " if tried > 1 else ""
            raise OutOfMemory(
                f"step {number} needs more memory than there is on {self._device} with {tried} "
                f"items at once{before} ({self._reason}); {lower}set fine_tune.precision: bf16, or "
                "take more devices (meta.gpu in dvc.yaml)"
            )
        self.micro_batch, self.halved_at = (tried + 1) // 2, number
        logging.getLogger(__name__).warning(
            "step %d needs more memory than there is on %s with %d items at once; goes on with %d, "
            "which fine_tune.micro_batch sets from the start",
            number, self._device, tried, self.micro_batch,
        )  # fmt: skip


class Bf16(nn.Module):
    """A module whose products are computed in bfloat16; its weights and results are float32."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module = module
        self._device = device

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module makes of a batch, as float32."""
        with torch.autocast(self._device, torch.bfloat16):
            rows: Tensor = self.module(x)
        return rows.float()


def check(recipe: FineTune, device: torch.device) -> None:
    """Raise unless a device can do what a recipe asks for; see `Passage`."""
    if (
        recipe.precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise InvalidInput(
            f"fine_tune.precision is bf16, which {torch.cuda.get_device_name()} does not compute "
            "with; remove it from params.yaml, or use a device from Ampere on"
        )
    if recipe.compile:
        _check_compiler(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def _prepared(tower: Tower, recipe: FineTune) -> nn.Module:
    """Return the module of a tower, or what stands for it; the parameters are the same."""
    module: Any = torch.compile(tower.module) if recipe.compile else tower.module
    if recipe.precision == "bf16":
        return Bf16(module, tower.device.type)
    return module


@cache
def _check_compiler(device: torch.device) -> None:
    """Compile something small: torch says only then what is missing."""
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # the compilers raise a dozen types
        reason = " ".join(str(error).split())[:300]
        needed = "triton, which comes with torch for CUDA," if device.type == "cuda" else "g++"
        raise MissingDependency(
            f"fine_tune.compile: torch.compile does not work here: {reason}; "
            f"install {needed} or remove compile from params.yaml"
        ) from None


def _small(x: Tensor) -> Tensor:
    return x.sin() + 1
