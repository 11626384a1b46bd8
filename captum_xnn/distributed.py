"""Processes that fit the same explainers together: who they are, and the few things they tell each other.

Every process draws the same batches and takes its part of their rows. What Eq. 5 needs of the whole batch, the errors
:math:`Q_k` and the moments of the x-features, is averaged over the processes before the logarithm and the cosine, and
so are the gradients. The number of processes then changes nothing but the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["ALONE", "Ranks", "launched", "speaks"]


@dataclass(frozen=True)
class Ranks:
    """One of several processes, and how many there are.

    Args:
        rank: Number of this process, from 0.
        world: Number of processes. More than one speak through the default group of ``torch.distributed``.

    Example:
        >>> import torch
        >>> ALONE.mean(torch.tensor(3.0))
        tensor(3.)
        >>> Ranks(1, 2).part(torch.arange(5))
        tensor([1, 3])
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Returns this process among those of the default group, as torchrun and init_process_group set it up.

        Raises:
            RuntimeError: If there is no group.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "expected a group of processes, got none; run under torchrun and call "
                "torch.distributed.init_process_group first, or leave distributed out"
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that shows progress and writes files."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Returns this process's part of the last dimension of row numbers.

        Args:
            rows: Row numbers (..., m).
        """
        return rows[..., self.rank :: self.world]

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over the processes, with the gradient of this process's values.

        Where gradients of weights are then averaged too, they are those of a function of the mean.

        Args:
            values: Of the same shape in every process.
        """
        if self.world == 1:
            return values
        mean = values.detach().clone()
        self.average(mean)
        return mean + (values - values.detach())

    def average(self, values: Tensor) -> None:
        """Replaces values by their mean over the processes.

        Args:
            values: Of the same shape in every process.
        """
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world

    def same(self, values: Tensor) -> Tensor:
        """Returns the first process's values, bit for bit, in every process.

        Args:
            values: Of the same shape in every process.
        """
        if self.world > 1:
            values = values.contiguous()
            distributed.broadcast(values, 0)
        return values

    def all_of(self, own: Any) -> list[Any]:
        """Returns what every process has, in their order.

        Args:
            own: This process's; anything that can be pickled.
        """
        if self.world == 1:
            return [own]
        found = [None] * self.world
        distributed.all_gather_object(found, own)
        return found

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Ranks()


def speaks() -> bool:
    """Returns whether this process is to say what all have done: not where it is another than torchrun's first.

    Example:
        >>> speaks()
        True
    """
    many = distributed.is_available() and distributed.is_torchelastic_launched()
    return not many or os.environ["RANK"] == "0"


@contextmanager
def launched() -> Iterator[bool]:
    """Returns a context in which the processes that torchrun started are a group; whether there are any.

    They speak by NCCL about tensors on GPUs, of which each process takes its own, and by Gloo about others.

    Raises:
        RuntimeError: If another process ended while this one was waiting for it.

    Example:
        >>> with launched() as many:
        ...     many
        False
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield False
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    try:
        yield True
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise RuntimeError(
            f"expected all processes to go on together, lost another ({str(error)[:120]}); look for what that one "
            "said, and call again: finished shards and the last checkpoint stay"
        ) from error
    finally:
        distributed.destroy_process_group()
