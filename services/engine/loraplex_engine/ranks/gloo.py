"""A `RankGroup` of ranks on CPUs of one host, over gloo on the loopback."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch._C._distributed_c10d import Store

TIMEOUT: Final = timedelta(seconds=30)
"""A collective that some rank does not join within this has failed. A rank's death is noticed at once: its connections end."""
LOOPBACK: Final = "127.0.0.1"


_dist: Final[Any] = distributed  # torch's stubs lack what process groups can do


class GlooGroup:
    """See `RankGroup`; the constructor returns once all ranks are connected.

    Steps and loads have connections of their own, so that their collectives may overlap.

    Args:
        store: Where the ranks meet; theirs alone.
        rank: This rank.
        degree: All ranks.
        timeout: How long a collective may take.
    """

    def __init__(self, store: Store, rank: int, degree: int, *, timeout: timedelta = TIMEOUT) -> None:
        self._rank, self._degree = rank, degree
        self._is_broken = False
        self._collective_s = 0.0
        self._steps, self._loads = (
            _process_group(_dist.PrefixStore(name, store), rank, degree, timeout) for name in ("steps", "loads")
        )

    @classmethod
    def meet(cls, meeting_fd: int, rank: int, degree: int, *, timeout: timedelta = TIMEOUT) -> GlooGroup:
        """Join ranks in other processes of this host.

        Args:
            meeting_fd: A memory file that they alone use, empty at first. It stays open for longer than the group lives: the group's
                end writes to whatever has its number.
            rank: As the constructor's, as are the others.
            degree: All ranks.
            timeout: How long a collective may take.
        """
        return cls(_dist.FileStore(f"/proc/self/fd/{meeting_fd}", degree), rank, degree, timeout=timeout)

    @property
    def rank(self) -> int:
        """See `RankGroup`."""
        return self._rank

    @property
    def degree(self) -> int:
        """See `RankGroup`."""
        return self._degree

    @property
    def collective_s(self) -> float:
        """See `RankGroup`."""
        return self._collective_s

    def all_reduce(self, values: Tensor) -> None:
        """See `RankGroup`."""
        self._check()
        self._finish(self._steps.allreduce([values if values.is_contiguous() else values.t()]))

    def all_reduce_of_load(self, values: Tensor) -> None:
        """See `RankGroup`."""
        self._check()
        self._loads.allreduce([values]).wait()

    def broadcast(self, values: Tensor) -> None:
        """See `RankGroup`."""
        self._check()
        self._finish(self._steps.broadcast(values, 0))

    def gather(self, values: Tensor, parts: Sequence[Tensor]) -> None:
        """See `RankGroup`."""
        self._check()
        self._finish(self._steps.gather(list(parts), values, 0))

    def all_gather(self, values: Tensor, gathered: Tensor) -> None:
        """See `RankGroup`."""
        self._check()
        self._finish(self._steps.allgather([list(gathered)], [values]))

    def abort(self) -> None:
        """See `RankGroup`: the others find the connections of a rank that ends closed."""
        self._is_broken = True
        for each in (self._steps, self._loads):
            each.abort()

    def close(self) -> None:
        """Leave the group: connections end, and what the ranks met through is not used again."""
        self._is_broken = True
        del self._steps, self._loads

    def _finish(self, work: Any) -> None:
        """Wait for a collective of a step, and count how long that takes."""
        began_s = time.perf_counter()
        work.wait()
        self._collective_s += time.perf_counter() - began_s

    def _check(self) -> None:
        if self._is_broken:
            raise RuntimeError(f"rank {self._rank} has left its group")


def _process_group(store: Store, rank: int, degree: int, timeout: timedelta) -> Any:
    gloo = _dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return gloo(store, rank, degree, options)
