"""The several adapters of a plan's rows, as the kernels take them: as terms of chains, or one pass after the other.

Chains add a row's adapters up in one launch (`loraplex_kernels.lora.chains`). Kernels that take one adapter a row are launched
once more for each further place in the lists: pass k has the k-th further adapter of each row that has so many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from loraplex_common.request_limits import MAX_ADAPTERS
from loraplex_kernels.lora.chain_items import Terms, make_terms
from loraplex_kernels.lora.items import within_runs

from loraplex_engine.step import NO_ADAPTER, NO_MORE_ADAPTERS

if TYPE_CHECKING:
    from loraplex_kernels.lora.tables import AdapterTables
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.step import MoreAdapters, StepPlan


class RowPass(NamedTuple):
    """One place in the lists of a step's rows.

    Attributes:
        adapters: int32 ``[N]``; ``NO_ADAPTER`` for rows with shorter lists.
        scales: fp32 ``[N]``; the request's factor on the adapter.
    """

    adapters: NDArray[np.int32]
    scales: NDArray[np.float32]


def used_adapters(adapters: NDArray[np.int32], more: MoreAdapters = NO_MORE_ADAPTERS) -> NDArray[np.int32]:
    """Return the adapters of rows, int32, each at least once."""
    used: NDArray[np.int32] = adapters[adapters >= 0]
    return np.concatenate([used, more.adapters]) if len(more.adapters) else used


def needs_chains(tables: AdapterTables, used: NDArray[np.int32], more: MoreAdapters) -> bool:
    """Tell whether decode kernels must be those of chains: for rows with several adapters, or large ranks."""
    return len(more.rows) > 0 or bool(tables.is_wide[used].any())


def row_terms(adapters: NDArray[np.int32], scales: NDArray[np.float32], more: MoreAdapters = NO_MORE_ADAPTERS) -> Terms:
    """Return the terms of rows of one token each."""
    return make_terms(adapters, scales, more.rows, more.adapters, more.scales)


def token_terms(plan: StepPlan) -> Terms:
    """Return the terms of all tokens of a plan."""
    lengths, more = plan.num_tokens, plan.more_adapters
    begins, of_entry = np.cumsum(lengths) - lengths, lengths[more.rows].astype(np.int64)
    places = np.repeat(begins[more.rows], of_entry) + within_runs(of_entry)
    return make_terms(
        np.repeat(plan.adapters, lengths),
        np.repeat(plan.adapter_scales, lengths),
        places.astype(np.int32),
        np.repeat(more.adapters, of_entry),
        np.repeat(more.scales, of_entry),
    )


def rows_of(more: MoreAdapters, first: int, stop: int) -> MoreAdapters:
    """Return the entries of rows ``[first, stop)``; rows keep their numbers."""
    begin, end = np.searchsorted(more.rows, (first, stop))
    return type(more)(rows=more.rows[begin:end], adapters=more.adapters[begin:end], scales=more.scales[begin:end])


def row_passes(more: MoreAdapters, num_rows: int) -> list[RowPass]:
    """Return the passes that the further adapters of rows take."""
    place = within_runs(np.bincount(more.rows, minlength=num_rows))
    passes = []
    for number in range(int(place.max(initial=-1)) + 1):
        chosen = place == number
        adapters = np.full(num_rows, NO_ADAPTER, dtype=np.int32)
        scales = np.zeros(num_rows, dtype=np.float32)
        adapters[more.rows[chosen]], scales[more.rows[chosen]] = more.adapters[chosen], more.scales[chosen]
        passes.append(RowPass(adapters, scales))
    return passes


class PassScales:
    """The factors of passes on the device.

    Attributes:
        buffer: fp32 ``[passes, max_tokens]``.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.buffer = torch.zeros((MAX_ADAPTERS - 1, max_tokens), dtype=torch.float32, device=device)
        self._pinned = device.type == "cuda"

    def upload(self, passes: list[RowPass], lengths: NDArray[np.int32]) -> list[Tensor]:
        """Copy them on the current stream; return those of each pass, fp32 ``[tokens]``.

        Args:
            passes: At most `MAX_ADAPTERS` - 1.
            lengths: int32 ``[N]``; tokens of each row.
        """
        if not passes:
            return []
        host = torch.from_numpy(np.stack([np.repeat(each.scales, lengths) for each in passes]))
        target = self.buffer[: len(passes), : host.shape[1]]
        target.copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)
        return [target[number] for number in range(len(passes))]
