"""Records of networks that train at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["History", "Record"]


class Record(NamedTuple):
    """Losses of one network at one step of gradient descent, on standardised Z and y. Statistics are running means.

    For a form with plain reconstruction, ``sparse_reconstruction`` holds the plain error. For a form without a
    pull-away term, ``pull_away`` is 0.
    """

    step: int
    faithfulness: float
    sparse_reconstruction: float
    pull_away: float


class History:
    """Collect records, and send each of them once to the callback of its network.

    Records stay on the device until they are sent or listed, so that training does not wait for them.

    Args:
        logs: For each network a callback that receives its records, or None.

    Example:
        >>> import torch
        >>> history = History([print, None])
        >>> history.add(7, [0, 1], torch.tensor([[1.0, 0.5, 0.25], [2.0, 0.0, 0.0]]))
        >>> history.send()
        Record(step=7, faithfulness=1.0, sparse_reconstruction=0.5, pull_away=0.25)
        >>> history.send()
        >>> history.of_each()[1]
        [Record(step=7, faithfulness=2.0, sparse_reconstruction=0.0, pull_away=0.0)]
    """

    def __init__(self, logs: Sequence[Callable[[Record], None] | None]) -> None:
        self.logs = logs
        self._records: list[tuple[int, list[int], Tensor]] = []
        self._sent = 0

    def add(self, step: int, networks: Sequence[int], terms: Tensor) -> None:
        """Add the records of one step.

        Args:
            step: Number of the step.
            networks: Indices of the networks that took the step.
            terms: Terms of the loss of each of these networks, (networks, terms).
        """
        self._records.append((step, list(networks), terms))

    def send(self) -> None:
        """Send new records to the callbacks."""
        for step, networks, terms in self._records[self._sent :]:
            for t, row in zip(networks, terms, strict=True):
                log = self.logs[t]
                if log is not None:
                    log(Record(step, *row.tolist()))
        self._sent = len(self._records)

    def of_each(self) -> list[list[Record]]:
        """List the records of each network."""
        return [
            [
                Record(step, *terms[networks.index(t)].tolist())
                for step, networks, terms in self._records
                if t in networks
            ]
            for t in range(len(self.logs))
        ]

    @property
    def state(self) -> list[Any]:
        """All records. Assign them to resume from there: they count as sent."""
        return [(step, networks, terms.cpu()) for step, networks, terms in self._records]

    @state.setter
    def state(self, saved: list[Any]) -> None:
        self._records, self._sent = list(saved), len(saved)
