"""Orders a step's rows so that rows with the same adapters lie together, and cuts their tokens into segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from loraplex_engine.runners.torch.segment import Segment
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from loraplex_engine.step import StepPlan


def used_adapters(plan: StepPlan) -> list[int]:
    """Return the indices of all adapters that a plan names."""
    used: list[int] = np.unique(np.concatenate([plan.adapters, plan.more_adapters.adapters])).tolist()
    return [index for index in used if index != NO_ADAPTER]


def order_rows(plan: StepPlan) -> NDArray[np.int64]:
    """Return a plan's rows in the order in which they are computed: rows with equal lists of adapters in a row."""
    if not len(plan.more_adapters.rows):
        return np.argsort(plan.adapters, kind="stable")
    return np.lexsort(_lists_of(plan)[0].T[::-1])  # the last key is the first one sorted by


def cut_segments(
    plan: StepPlan, order: NDArray[np.int64], tables: Mapping[int, AdapterTable], device: torch.device
) -> list[list[Segment]]:
    """Return the step's segments, those of tokens with several adapters beside each other.

    Args:
        plan: The plan.
        order: From `order_rows`.
        tables: The adapters that the plan names.
        device: Where the step is computed.
    """
    adapters, scales = _lists_of(plan)
    adapters, scales = adapters[order], scales[order]
    num_tokens = plan.num_tokens[order]
    ends = np.cumsum(num_tokens)
    is_first = np.concatenate([[True], (adapters[1:] != adapters[:-1]).any(axis=1)])
    firsts = np.flatnonzero(is_first).tolist()
    groups = []
    for first, end in zip(firsts, [*firsts[1:], len(order)], strict=True):
        begin, last = int(ends[first] - num_tokens[first]), int(ends[end - 1])
        group = []
        for place, index in enumerate(adapters[first].tolist()):
            if index != NO_ADAPTER:
                own = np.repeat(scales[first:end, place], num_tokens[first:end])
                column = torch.from_numpy(own).to(device) if (own != 1).any() else None
                group.append(Segment(first=begin, last=last, table=tables[index], scales=column))
        if group:
            groups.append(group)
    return groups


def _lists_of(plan: StepPlan) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return each row's adapters and their scales, ``[N, M]`` with M the most of any row, filled up with `NO_ADAPTER`."""
    more, num_rows = plan.more_adapters, len(plan.adapters)
    if not len(more.rows):
        return plan.adapters[:, None], plan.adapter_scales[:, None].astype(np.float32)
    counts = np.bincount(more.rows, minlength=num_rows)
    places = 1 + np.arange(len(more.rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    adapters = np.full((num_rows, 1 + counts.max()), NO_ADAPTER, dtype=np.int32)
    scales = np.ones(adapters.shape, dtype=np.float32)
    adapters[:, 0], scales[:, 0] = plan.adapters, plan.adapter_scales
    adapters[more.rows, places], scales[more.rows, places] = more.adapters, more.scales
    return adapters, scales


def token_ends(plan: StepPlan, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the tokens of each row of the plan end among the step's tokens, int64 ``[N]``."""
    ends = np.empty(len(order), dtype=np.int64)
    ends[order] = np.cumsum(plan.num_tokens[order])
    return ends
