"""Processes that fit the same explainers together: their ranks, and the values that they exchange.

Every process draws the same batches and takes its part of their rows. Eq. 5 needs the errors :math:`Q_k` and the
moments of the x-features over the whole batch. The processes average both before the logarithm and the cosine. They
also average the gradients. The number of processes therefore changes only the order of sums.
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
    """The number of this process, and the number of all processes.

    Args:
        rank: Rank of this process, from 0.
        world: Number of processes. Several use the default group of ``torch.distributed``.

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
        """Read the ranks of the default group, as set up by torchrun and init_process_group.

        Raises:
            RuntimeError: If there is no group.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "there is no group of processes; run under torchrun and call "
                "torch.distributed.init_process_group first, or leave distributed out"
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that shows progress and writes files."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Select this process's part of row indices, along the last dimension.

        Args:
            rows: Row indices (..., m).
        """
        return rows[..., self.rank :: self.world]

    def mean(self, values: Tensor) -> Tensor:
        """Average values over the processes, with the gradient of this process's values.

        If the gradients of weights are averaged afterwards, they equal the gradients of a function of the mean.

        Args:
            values: This process's values, of the same shape in every process.
        """
        if self.world == 1:
            return values
        mean = values.detach().clone()
        self.average(mean)
        return mean + (values - values.detach())

    def average(self, values: Tensor) -> None:
        """Replace values in place by their mean over the processes.

        Args:
            values: This process's values, of the same shape in every process.
        """
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world

    def same(self, values: Tensor) -> Tensor:
        """Broadcast the first process's values, bit for bit, to every process.

        Args:
            values: This process's values, of the same shape in every process.
        """
        if self.world > 1:
            values = values.contiguous()
            distributed.broadcast(values, 0)
        return values

    def all_of(self, own: Any) -> list[Any]:
        """Gather one object from every process, in the order of ranks.

        Args:
            own: This process's object. It must be picklable.
        """
        if self.world == 1:
            return [own]
        found = [None] * self.world
        distributed.all_gather_object(found, own)
        return found

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world > 1:
            distributed.barrier()


ALONE = Ranks()


def speaks() -> bool:
    """Whether this process prints for all: it was not started by torchrun, or has rank 0.

    Example:
        >>> speaks()
        True
    """
    many = distributed.is_available() and distributed.is_torchelastic_launched()
    return not many or os.environ["RANK"] == "0"


@contextmanager
def launched() -> Iterator[bool]:
    """Join the processes started by torchrun into a group within a context. Yield whether torchrun started any.

    Each process takes its own GPU. The group exchanges tensors on GPUs by NCCL and other tensors by Gloo.

    Raises:
        RuntimeError: If another process ended while this one waited for it.

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
            f"the connection to another process was lost ({str(error)[:120]}); look for the error message of that "
            "process, and call again: finished shards and the last checkpoint stay"
        ) from error
    finally:
        distributed.destroy_process_group()
