"""The contract between what computes and a tensor-parallel group: the collectives of one rank.

All ranks call them in one order. They run on torch tensors in the memory of the backend's device, so that a group of processes
on CPUs (gloo) and one of GPUs (NCCL) are the same calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class RankGroup(Protocol):
    """One rank's end of its group. An exception of a collective means that the group is gone.

    Attributes:
        rank: This rank; 0 decides, draws and talks to others.
        degree: Ranks of the group, two at least.
    """

    @property
    def rank(self) -> int:
        """Number of this rank."""
        ...

    @property
    def degree(self) -> int:
        """Ranks of the group."""
        ...

    @property
    def collective_s(self) -> float:
        """Seconds that this rank's steps have spent in collectives; those of loads are left out."""
        ...

    def all_reduce(self, values: Tensor) -> None:
        """Replace values by their sum over ranks, in place; a 2-dimensional tensor may be a transposed one."""
        ...

    def all_reduce_of_load(self, values: Tensor) -> None:
        """Do the same with contiguous values of an adapter that is being loaded, beside the collectives of steps.

        Loads call it from one thread, in the order in which they were started.
        """
        ...

    def broadcast(self, values: Tensor) -> None:
        """Overwrite contiguous values with those of rank 0."""
        ...

    def gather(self, values: Tensor, parts: Sequence[Tensor]) -> None:
        """Bring contiguous values of all ranks to rank 0.

        Args:
            values: The shape is the same on all ranks.
            parts: On rank 0 one tensor of that shape for each rank, written; elsewhere empty.
        """
        ...

    def all_gather(self, values: Tensor, gathered: Tensor) -> None:
        """Bring contiguous values of all ranks to all of them.

        Args:
            values: One-dimensional, ``[n]``, as long on all ranks.
            gathered: Contiguous, ``[degree, n]``, of the same type; written.
        """
        ...

    def abort(self) -> None:
        """Break the group: this rank cannot go on in step with the others; every later collective raises on all ranks."""
        ...
