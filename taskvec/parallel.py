"""Processes that train one model together: each takes its share of every batch.

All of them draw the same batches and take the same steps; only the gradients travel, summed over
the processes before a step. Shares may differ by an item or be empty, so that any number of
processes learns from exactly the batches that one process learns from.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Group(Protocol):
    """The processes that train together, as one of them sees them.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def share(self, batch: Tensor) -> Tensor:
        """Return the part of a batch of positions that this process is to learn from."""
        ...

    def total(self, parameters: Sequence[nn.Parameter], loss: Tensor | None) -> Tensor | None:
        """Sum gradients, in place, and losses over the processes; return the sum of the losses.

        Args:
            parameters: the same ones in every process; a gradient that is None counts as zero.
            loss: of this process's share, or None if the process could not compute it.

        Returns:
            None if any process gave None; the gradients mean nothing then.
        """
        ...


class Alone:
    """One process by itself."""

    rank = 0
    size = 1

    def share(self, batch: Tensor) -> Tensor:
        """Return the whole batch."""
        return batch

    def total(self, parameters: Sequence[nn.Parameter], loss: Tensor | None) -> Tensor | None:
        """Return the loss; the gradients are complete."""
        del parameters
        return loss


class Ranks:
    """The processes of torch.distributed's default group; see `joined`."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._flat = torch.empty(0)

    def share(self, batch: Tensor) -> Tensor:
        """Return every share but the last ones longer by an item where the batch needs it."""
        return batch.tensor_split(self.size)[self.rank]

    def total(self, parameters: Sequence[nn.Parameter], loss: Tensor | None) -> Tensor | None:
        """Sum everything in one message: losses, failures, who has a gradient, the gradients."""
        sizes = [parameter.numel() for parameter in parameters]
        flat = self._buffer(2 + len(sizes) + sum(sizes), parameters[0].device).zero_()
        head, had, rest = flat.split([2, len(sizes), sum(sizes)])
        parts = rest.split(sizes)
        if loss is None:
            head[1] = 1
        else:
            head[0] = loss
            for i, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    had[i] = 1
                    parts[i].view(parameter.shape).copy_(parameter.grad)
        dist.all_reduce(flat)
        if head[1] > 0:
            return None
        # The optimizer passes over a parameter without gradient, weight decay included.
        for parameter, part, known in zip(parameters, parts, had.tolist(), strict=True):
            if known:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(part.view(parameter.shape))
        return head[0].clone()

    def _buffer(self, length: int, device: torch.device) -> Tensor:
        """Return the buffer of the sums, made once: later there may be no memory for it."""
        if len(self._flat) != length:
            self._flat = torch.empty(length, device=device)
        return self._flat


@contextmanager
def joined(rank: int, size: int, meeting: Path) -> Iterator[Ranks]:
    """Join the other processes of this machine: NCCL where there is CUDA, else gloo.

    Args:
        rank: the number of this process, from 0; also that of its CUDA device.
        size: how many processes there are.
        meeting: a file that does not exist, the same for all; they find each other through it.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    yield Ranks()
    # After an error the others may be gone, and to take leave of them would hang.
    dist.destroy_process_group()
