"""Paged attention over the unified pool, in torch.

KV pages lie in-page as ``[layer][K|V][kv_head][token][dim]`` (design.md section 4), so the pool is also a table of
*rows*, one per (page, layer, K or V, kv_head), each ``block_tokens * head_dim`` values in one piece. Gathering the rows
a batch needs, in the order (K|V, sequence, kv_head, block), gives contiguous keys and values with one index_select.

Decode rows are attended in groups of similar context length; the queries that share a KV head form the query dimension
of one batched product. Prefill rows are attended one by one.

Legend: T = tokens of the step, G = queries per KV head, B = blocks gathered per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.step import StepPlan

MAX_GROUP_BYTES: Final = 64 * 1024 * 1024  # of gathered keys and values per layer
MAX_PADDING: Final = 0.25  # of a group's blocks that may be gathered in vain


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Decode rows that are attended together.

    Attributes:
        tokens: int64 ``[n]``; their tokens in the step, or None if they are all of the step in order.
        rows: int64 ``[2 * n * kv_heads * B]``; rows of the pool to gather, of layer 0.
        mask: ``[n, 1, 1, B * block_tokens]``; 0 where attended, else -inf.
    """

    num_sequences: int
    tokens: Tensor | None
    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRow:
    """One prefill chunk.

    Attributes:
        first, last: Half-open range of its tokens in the step.
        rows: int64 ``[2 * kv_heads * B]``; rows of the pool to gather, of layer 0; None if the chunk sees only itself.
        mask: Boolean ``[chunk, keys]``; None for plain causal attention.
    """

    first: int
    last: int
    rows: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlan:
    """What layers of one window size attend to in a step."""

    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


class AttentionStep:
    """Where a step's tokens are written and what they attend to; built once per step, used by every layer.

    Attributes:
        positions: int64 ``[T]``, in the order of the step's tokens.
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
        lengths = plan.num_tokens[order].astype(np.int64)
        starts = plan.starts[order].astype(np.int64)
        tables = plan.block_tables[order].astype(np.int64)
        firsts = np.cumsum(lengths) - lengths
        row_of_token = np.repeat(np.arange(len(order)), lengths)
        positions = starts[row_of_token] + np.arange(lengths.sum()) - firsts[row_of_token]
        self.positions = torch.from_numpy(positions).to(pool.device)
        tokens_per_block = pool.geometry.block_tokens
        pages = tables[row_of_token, positions // tokens_per_block]
        self.write_index = pool.token_index(pages, positions % tokens_per_block)
        self._new_pages = _partly_filled_new_pages(starts, lengths, tables, tokens_per_block)
        is_decode = order < plan.num_decode_rows
        self.windows = {
            window: WindowPlan(
                decode=_decode_groups(pool, np.flatnonzero(is_decode), starts, tables, firsts, len(positions), window),
                prefill=[
                    _prefill_row(pool, int(starts[row]), int(lengths[row]), tables[row], int(firsts[row]), window)
                    for row in np.flatnonzero(~is_decode)
                ],
            )
            for window in windows
        }

    def clear_new_pages(self) -> None:
        """Zero the pages that this step begins and does not fill.

        Masked positions get weight zero, but zero times NaN is NaN: what an earlier owner left must not be read.
        """
        if self._new_pages.size:
            self._pool.pages[torch.from_numpy(self._new_pages).to(self._pool.device)] = 0


def _partly_filled_new_pages(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], tables: NDArray[np.int64], block_tokens: int
) -> NDArray[np.int64]:
    ends = starts + lengths
    last_blocks = (ends - 1) // block_tokens
    is_new = (last_blocks * block_tokens >= starts) & (ends % block_tokens != 0)
    return tables[np.flatnonzero(is_new), last_blocks[is_new]]


def _first_visible(position: NDArray[np.int64] | int, window: int | None) -> NDArray[np.int64]:
    return np.maximum(np.asarray(position) - window + 1, 0) if window is not None else np.zeros_like(position)


def _cut_into_groups(blocks: NDArray[np.int64], max_blocks: int) -> list[NDArray[np.int64]]:
    """Cut rows, longest first, so that little is gathered in vain and no group is too large."""
    by_length = np.argsort(-blocks, kind="stable")
    groups: list[NDArray[np.int64]] = []
    start, wanted = 0, 0
    for end, row in enumerate(by_length):
        padded = int(blocks[by_length[start]]) * (end - start + 1)
        wanted += int(blocks[row])
        if end > start and (padded - wanted > MAX_PADDING * padded + 4 or padded > max_blocks):
            groups.append(np.sort(by_length[start:end]))
            start, wanted = end, int(blocks[row])
    return [*groups, np.sort(by_length[start:])]


def _decode_groups(
    pool: PagedPool,
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    tables: NDArray[np.int64],
    firsts: NDArray[np.int64],
    num_tokens: int,
    window: int | None,
) -> list[DecodeGroup]:
    if not rows.size:
        return []
    size = pool.geometry.block_tokens
    positions = starts[rows]
    first_blocks = _first_visible(positions, window) // size
    num_blocks = positions // size + 1 - first_blocks
    groups = []
    for members in _cut_into_groups(num_blocks, pool.max_group_blocks):
        width = int(num_blocks[members].max())
        columns = np.arange(width)[None, :]
        # Padding repeats a row's own first block: its values are finite unless the row is broken anyway.
        blocks = first_blocks[members, None] + np.where(columns < num_blocks[members, None], columns, 0)
        pages = tables[rows[members, None], blocks]
        keys = (first_blocks[members, None] + columns)[:, :, None] * size + np.arange(size)
        query = positions[members, None, None]
        visible = (keys <= query) & (keys >= _first_visible(positions[members], window)[:, None, None])
        mask = np.where(visible.reshape(len(members), 1, 1, -1), np.float32(0), np.float32(-np.inf))
        tokens = firsts[rows[members]]
        is_whole_step = len(members) == num_tokens and bool((tokens == np.arange(num_tokens)).all())
        groups.append(
            DecodeGroup(
                num_sequences=len(members),
                tokens=None if is_whole_step else torch.from_numpy(tokens).to(pool.device),
                rows=pool.gather_index(pages),
                mask=torch.from_numpy(mask).to(pool.device, pool.dtype),
            )
        )
    return groups


def _prefill_row(
    pool: PagedPool, start: int, length: int, table: NDArray[np.int64], first: int, window: int | None
) -> PrefillRow:
    if start == 0 and (window is None or length <= window):
        return PrefillRow(first=first, last=first + length, rows=None, mask=None)
    size = pool.geometry.block_tokens
    first_block = int(_first_visible(start, window)) // size if start else 0
    queries = np.arange(start, start + length)
    if start == 0:
        rows, keys = None, queries
    else:
        num_blocks = (start + length - 1) // size + 1
        rows = pool.gather_index(table[None, first_block:num_blocks])
        keys = np.arange(first_block * size, num_blocks * size)
    visible = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= _first_visible(queries, window)[:, None])
    mask = torch.from_numpy(visible).to(pool.device)
    return PrefillRow(first=first, last=first + length, rows=rows, mask=mask)


class PagedPool:
    """The pool's memory, seen as KV pages.

    Attributes:
        pages: uint8 ``[num_pages, page_bytes]``.
    """

    def __init__(self, pages: Tensor, geometry: PoolGeometry, num_heads: int, dtype: torch.dtype) -> None:
        self.pages = pages
        self.geometry = geometry
        self.device = pages.device
        self.dtype = dtype
        self._group_size = num_heads // geometry.num_kv_heads
        self._scale = 1 / math.sqrt(geometry.head_dim)
        values = pages.view(dtype).view(-1)
        self._rows = values.view(-1, geometry.block_tokens * geometry.head_dim)
        self._tokens = values.view(-1, geometry.head_dim)
        heads = 2 * geometry.num_kv_heads
        self._row_heads = torch.arange(heads, device=self.device)
        self._layer_rows = heads
        self._layer_tokens = heads * geometry.block_tokens
        self.max_group_blocks = max(1, MAX_GROUP_BYTES // (heads * geometry.row_bytes))

    def token_index(self, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> Tensor:
        """Return where layer 0's keys and values of each token lie: int64 ``[T * 2 * kv_heads]`` into tokens of the pool."""
        geometry = self.geometry
        rows = pages[:, None] * geometry.rows_per_page + np.arange(2 * geometry.num_kv_heads)
        index = rows * geometry.block_tokens + offsets[:, None]
        return torch.from_numpy(index.reshape(-1)).to(self.device)

    def gather_index(self, pages: NDArray[np.int64]) -> Tensor:
        """Return the rows of layer 0 of pages ``[n, B]`` in the order (K|V, n, kv_head, B)."""
        geometry = self.geometry
        heads = np.arange(2 * geometry.num_kv_heads).reshape(2, 1, geometry.num_kv_heads, 1)
        index = pages[None, :, None, :] * geometry.rows_per_page + heads
        return torch.from_numpy(index.reshape(-1)).to(self.device)

    def write(self, layer: int, step: AttentionStep, keys_values: Tensor) -> None:
        """Write a step's keys and values of one layer, ``[T, 2 * kv_heads, head_dim]``."""
        index = step.write_index + layer * self._layer_tokens
        self._tokens.index_copy_(0, index, keys_values.reshape(-1, self.geometry.head_dim))

    def _gather(self, layer: int, rows: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        gathered = self._rows.index_select(0, rows + layer * self._layer_rows)
        shape = (2, num_sequences, self.geometry.num_kv_heads, -1, self.geometry.head_dim)
        keys, values = gathered.view(shape).unbind(0)
        return keys, values

    def attend(self, layer: int, step: WindowPlan, heads: Tensor, out: Tensor) -> None:
        """Attend from every token of a step; its keys and values are in the pool already.

        Args:
            layer: Decoder layer.
            step: The step, for the layer's window.
            heads: Rotated queries and keys, and values: ``[T, num_heads + 2 * kv_heads, head_dim]``.
            out: ``[T, num_heads * head_dim]``; written.
        """
        geometry = self.geometry
        num_queries = geometry.num_kv_heads * self._group_size
        for group in step.decode:
            queries = heads[:, :num_queries]
            if group.tokens is not None:
                queries = queries.index_select(0, group.tokens)
            shape = (group.num_sequences, geometry.num_kv_heads, self._group_size, geometry.head_dim)
            keys, values = self._gather(layer, group.rows, group.num_sequences)
            attended = self._attend_decode(queries.reshape(shape), keys, values, group.mask)
            flat = attended.reshape(group.num_sequences, -1)
            if group.tokens is None:
                out.copy_(flat)
            else:
                out[group.tokens] = flat
        for row in step.prefill:
            out[row.first : row.last] = self._attend_prefill(layer, row, heads[row.first : row.last])

    def _attend_decode(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scale)

    def _attend_prefill(self, layer: int, row: PrefillRow, heads: Tensor) -> Tensor:
        """Return ``[chunk, num_heads * head_dim]``."""
        num_kv_heads = self.geometry.num_kv_heads
        queries, keys, values = torch.split(heads, [num_kv_heads * self._group_size, num_kv_heads, num_kv_heads], dim=1)
        queries = queries.transpose(0, 1)[None]
        if row.rows is None:
            keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        else:
            keys, values = self._gather(layer, row.rows, 1)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=row.mask,
            is_causal=row.mask is None,
            scale=self._scale,
            enable_gqa=self._group_size > 1,
        )
        return attended[0].transpose(0, 1).reshape(heads.shape[0], -1)
