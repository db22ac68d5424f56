"""What a step's tokens attend to and where their keys and values go: computed once per step, used by every layer.

Legend: T = tokens of the step, G = queries per KV head, B = blocks gathered per sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.runners.torch.attention import DecodeGroup, PrefillRow, WindowStep

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.step import StepPlan

MAX_PADDING: Final = 0.25  # largest share of a group's blocks that is gathered in vain


class AttentionStep:
    """Positions, pages and masks of one step.

    Attributes:
        positions: int64 ``[T]``, in the order of the step's tokens.
        write_index: int64 ``[T * 2 * kv_heads]``; where layer 0's keys and values go, see `PagedPool.token_index`.
        windows: Attention of each window size; None is the size of unlimited attention.
    """

    def __init__(self, pool: PagedPool, plan: StepPlan, order: NDArray[np.int64], windows: set[int | None]) -> None:
        """Prepare a step.

        Args:
            pool: The pool.
            plan: The step.
            order: Rows of the plan in the order in which the runner computes them.
            windows: Sizes of attention window that occur in the model.
        """
        self._pool = pool
        size = pool.geometry.block_tokens
        self._starts = plan.starts[order].astype(np.int64)
        self._lengths = plan.num_tokens[order].astype(np.int64)
        self._tables = plan.block_tables[order].astype(np.int64)
        self._firsts = np.cumsum(self._lengths) - self._lengths
        self._is_decode = order < plan.num_decode_rows
        row_of_token = np.repeat(np.arange(len(order)), self._lengths)
        positions = (self._starts - self._firsts)[row_of_token] + np.arange(len(row_of_token))
        self.positions = torch.from_numpy(positions).to(pool.device)
        self.write_index = pool.token_index(self._tables[row_of_token, positions // size], positions % size)
        self.windows = {
            window: WindowStep(decode=self._decode_groups(window), prefill=self._prefill_rows(window))
            for window in windows
        }

    def clear_new_pages(self) -> None:
        """Zero the pages that this step begins and does not fill.

        Masked positions get weight zero, but zero times NaN is NaN: the values of an earlier owner must not be read.
        """
        size = self._pool.geometry.block_tokens
        ends = self._starts + self._lengths
        last_blocks = (ends - 1) // size
        is_new = (last_blocks * size >= self._starts) & (ends % size != 0)
        pages = self._tables[np.flatnonzero(is_new), last_blocks[is_new]]
        if pages.size:
            self._pool.pages[torch.from_numpy(pages).to(self._pool.device)] = 0

    def _decode_groups(self, window: int | None) -> list[DecodeGroup]:
        rows = np.flatnonzero(self._is_decode)
        if not rows.size:
            return []
        size = self._pool.geometry.block_tokens
        first_blocks = _first_visible(self._starts[rows], window) // size
        num_blocks = self._starts[rows] // size + 1 - first_blocks
        return [
            self._decode_group(rows[members], first_blocks[members], num_blocks[members], window)
            for members in _cut_into_groups(num_blocks, self._pool.max_group_blocks)
        ]

    def _decode_group(
        self,
        rows: NDArray[np.int64],
        first_blocks: NDArray[np.int64],
        num_blocks: NDArray[np.int64],
        window: int | None,
    ) -> DecodeGroup:
        pool, geometry = self._pool, self._pool.geometry
        columns = np.arange(num_blocks.max())
        # Padding repeats a row's own first block: its values are finite, unless the row is broken anyway.
        blocks = first_blocks[:, None] + np.where(columns < num_blocks[:, None], columns, 0)
        index = pool.gather_index(self._tables[rows[:, None], blocks])
        keys = ((first_blocks[:, None] + columns)[:, :, None] * geometry.block_tokens) + np.arange(
            geometry.block_tokens
        )
        positions = self._starts[rows]
        visible = (keys <= positions[:, None, None]) & (keys >= _first_visible(positions, window)[:, None, None])
        mask = np.where(visible.reshape(len(rows), -1), np.float32(0), np.float32(-np.inf))
        gathered = pool.scratch(len(index))
        pair = gathered.view(2, len(rows) * geometry.num_kv_heads, -1, geometry.head_dim)
        per_head = torch.from_numpy(np.repeat(mask, geometry.num_kv_heads, axis=0)).to(pool.device, pool.dtype)
        return DecodeGroup(
            num_sequences=len(rows),
            tokens=_slice_or_index(self._firsts[rows], pool.device),
            rows=index,
            layer_rows=torch.empty_like(index),
            gathered=gathered,
            keys_t=pair[0].transpose(1, 2),
            values=pair[1],
            mask=per_head[:, None].expand(-1, pool.group_size, -1),
        )

    def _prefill_rows(self, window: int | None) -> list[PrefillRow]:
        return [self._prefill_row(int(row), window) for row in np.flatnonzero(~self._is_decode)]

    def _prefill_row(self, row: int, window: int | None) -> PrefillRow:
        size = self._pool.geometry.block_tokens
        start, length, first = int(self._starts[row]), int(self._lengths[row]), int(self._firsts[row])
        tokens = slice(first, first + length)
        if start == 0 and (window is None or length <= window):
            return PrefillRow(tokens=tokens, rows=None, mask=None)
        queries = np.arange(start, start + length)
        rows, keys = None, queries
        if start:
            first_block = int(_first_visible(queries[:1], window)[0]) // size
            num_blocks = (start + length - 1) // size + 1
            rows = self._pool.gather_index(self._tables[row][None, first_block:num_blocks])
            keys = np.arange(first_block * size, num_blocks * size)
        visible = (keys <= queries[:, None]) & (keys >= _first_visible(queries, window)[:, None])
        return PrefillRow(tokens=tokens, rows=rows, mask=torch.from_numpy(visible).to(self._pool.device))


def _first_visible(positions: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    if window is None:
        return np.zeros_like(positions)
    return np.maximum(positions - (window - 1), 0)


def _slice_or_index(tokens: NDArray[np.int64], device: torch.device) -> slice | Tensor:
    first, last = int(tokens[0]), int(tokens[-1])
    if last - first == len(tokens) - 1:  # they are sorted
        return slice(first, last + 1)
    return torch.from_numpy(tokens).to(device)


def _cut_into_groups(num_blocks: NDArray[np.int64], max_blocks: int) -> list[NDArray[np.int64]]:
    """Cut rows into groups that gather at most ``max_blocks``, and few of them in vain.

    Rows of about the same length stay in their order, so that a group's tokens usually follow each other.
    """
    magnitude = np.ceil(np.log2(num_blocks) * 3)  # steps of 26 %
    by_length = np.argsort(-magnitude, kind="stable")
    groups: list[NDArray[np.int64]] = []
    start, longest, wanted = 0, 0, 0
    for end, row in enumerate(by_length.tolist()):
        blocks = int(num_blocks[row])
        padded = max(longest, blocks) * (end - start + 1)
        if end > start and (padded > max_blocks or padded - wanted - blocks > MAX_PADDING * padded):
            groups.append(np.sort(by_length[start:end]))
            start, longest, wanted = end, 0, 0
        longest, wanted = max(longest, blocks), wanted + blocks
    return [*groups, np.sort(by_length[start:])]
