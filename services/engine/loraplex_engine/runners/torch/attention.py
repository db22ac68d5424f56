"""Paged attention over the unified pool, in torch.

KV pages lie in-page as ``[layer][K|V][kv_head][token][dim]`` (`PoolGeometry`), so the pool is also a table of *rows*,
one per (page, layer, K or V, kv_head), each of them ``block_tokens * head_dim`` values in one piece (`kv_store`). Gathering
the rows that a batch needs, in the order (K|V, sequence, kv_head, block), gives contiguous keys and values with one
index_select; of FP8 it also multiplies them by their scales.

Decode rows are attended in groups of similar context length; the queries that share a KV head form the query dimension
of one batched product. Prefill rows are attended one by one.

Legend: T = tokens of the step, G = queries per KV head, B = blocks gathered per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_engine.runners.torch.kv_store import make_kv_store
from loraplex_engine.runners.torch.softcap import capped_attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.pool_geometry import PoolGeometry

# Bytes of gathered keys and values per layer and group. On a CPU they should still be in a core's L2 (1 to 2 MiB) when
# they are multiplied: 16 rows of 112 tokens take 0.64 ms a layer in groups of 0.5 MiB and 0.93 ms in groups of 1.4 MiB.
MAX_GROUP_BYTES: Final = {"cpu": 768 * 1024, "cuda": 64 * 1024 * 1024}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Decode rows that are attended together, with the buffer that they gather into.

    Attributes:
        tokens: The rows' tokens in the step: a slice if they are consecutive, else int64 ``[n]``.
        rows: int64 ``[2 * n * kv_heads * B]``; rows of the pool to gather, of layer 0.
        layer_rows: Like ``rows``; overwritten by each layer with its own.
        gathered: ``[2 * n * kv_heads * B, block_tokens * head_dim]``; overwritten by each layer.
        keys_t: ``[n * kv_heads, head_dim, B * block_tokens]``, a view of ``gathered``.
        values: ``[n * kv_heads, B * block_tokens, head_dim]``, a view of ``gathered``.
        mask: ``[n * kv_heads, G, B * block_tokens]``; 0 where attended, else -inf.
    """

    num_sequences: int
    tokens: slice | Tensor
    rows: Tensor
    layer_rows: Tensor
    gathered: Tensor
    keys_t: Tensor
    values: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRow:
    """One prefill chunk.

    Attributes:
        tokens: The chunk's tokens in the step.
        rows: int64 ``[2 * kv_heads * B]``; rows of the pool to gather, of layer 0; None if the chunk sees only itself.
        mask: Boolean ``[chunk, keys]``; None for plain causal attention.
    """

    tokens: slice
    rows: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowStep:
    """The groups and rows that layers of one window size attend to in a step."""

    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


class PagedPool:
    """The pool's memory, seen as KV pages.

    Attributes:
        pages: uint8 ``[num_pages, page_bytes]``.
        group_size: Queries per KV head.
        max_group_blocks: Blocks (all sequences together) that decode rows may gather at once.
    """

    def __init__(
        self,
        pages: Tensor,
        geometry: PoolGeometry,
        num_heads: int,
        dtype: torch.dtype,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        self.pages = pages
        self.geometry = geometry
        self.device = pages.device
        self.dtype = dtype
        self.group_size = num_heads // geometry.num_kv_heads
        self._num_heads = num_heads
        self._scale, self._softcap = scale, softcap
        self.values = pages.view(dtype).view(-1)
        self._store = make_kv_store(pages, geometry, dtype)
        self._heads_per_layer = 2 * geometry.num_kv_heads
        row = geometry.block_tokens * geometry.head_dim
        self._scratch = torch.empty((0, row), dtype=dtype, device=pages.device)
        self.max_group_blocks = MAX_GROUP_BYTES[self.device.type] // (self._heads_per_layer * row * dtype.itemsize)

    def token_index(self, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> Tensor:
        """Return where layer 0's keys and values of tokens lie: int64 ``[T * 2 * kv_heads]``, in units of head_dim.

        Args:
            pages: int64 ``[T]``.
            offsets: int64 ``[T]``; place of each token in its page.
        """
        rows = pages[:, None] * self.geometry.rows_per_page + np.arange(self._heads_per_layer)
        index = rows * self.geometry.block_tokens + offsets[:, None]
        return torch.from_numpy(index.reshape(-1)).to(self.device)

    def gather_index(self, pages: NDArray[np.int64]) -> Tensor:
        """Return the rows of layer 0 of pages ``[n, B]`` in the order (K|V, n, kv_head, B)."""
        heads = np.arange(self._heads_per_layer).reshape(2, 1, -1, 1)
        index = pages[None, :, None, :] * self.geometry.rows_per_page + heads
        return torch.from_numpy(index.reshape(-1)).to(self.device)

    def scratch(self, num_rows: int) -> Tensor:
        """Return a buffer for gathered rows; all groups share it, one after another."""
        if self._scratch.shape[0] < num_rows:
            self._scratch = self._scratch.new_empty((num_rows, self._scratch.shape[1]))
        return self._scratch[:num_rows]

    def write(self, layer: int, write_index: Tensor, keys_values: Tensor) -> None:
        """Write a step's keys and values of one layer, ``[T, 2 * kv_heads, head_dim]``, to `AttentionStep.write_index`.

        What is stored as FP8 is read back here: a chunk attends to its own tokens as later chunks will.
        """
        index = write_index + layer * self._heads_per_layer * self.geometry.block_tokens
        kept = self._store.write(index, keys_values.reshape(-1, self.geometry.head_dim))
        if kept is not None:
            keys_values.copy_(kept.view(keys_values.shape))

    def attend(self, layer: int, step: WindowStep, heads: Tensor, out: Tensor) -> None:
        """Attend from every token of a step; its keys and values are in the pool already.

        Args:
            layer: Decoder layer.
            step: The step, for the layer's window.
            heads: Rotated queries and keys, and values: ``[T, num_heads + 2 * kv_heads, head_dim]``.
            out: ``[T, num_heads * head_dim]``; written.
        """
        for group in step.decode:
            out[group.tokens] = self._attend_decode(layer, group, heads[:, : self._num_heads][group.tokens])
        for row in step.prefill:
            out[row.tokens] = self._attend_prefill(layer, row, heads[row.tokens])

    def _attend_decode(self, layer: int, group: DecodeGroup, queries: Tensor) -> Tensor:
        """Return ``[n, num_heads * head_dim]`` for queries ``[n, num_heads, head_dim]``."""
        torch.add(group.rows, layer * self._heads_per_layer, out=group.layer_rows)
        self._store.gather(group.layer_rows, group.gathered)
        by_kv_head = queries.reshape(-1, self.group_size, self.geometry.head_dim)
        if (
            self._softcap is not None
        ):  # the queries of a KV head lie where `capped_attention` expects those of one sequence
            keys = group.keys_t.transpose(1, 2)
            attended = capped_attention(
                by_kv_head, keys, group.values, group.mask, scale=self._scale, cap=self._softcap
            )
        elif self.dtype == torch.float32:
            scores = torch.baddbmm(group.mask, by_kv_head, group.keys_t, alpha=self._scale)
            attended = torch.bmm(torch.softmax(scores, dim=-1), group.values)
        else:  # the fused kernel, which keeps scores in fp32
            keys = group.keys_t.transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                by_kv_head, keys, group.values, attn_mask=group.mask, scale=self._scale
            )
        return attended.reshape(group.num_sequences, -1)

    def _attend_prefill(self, layer: int, row: PrefillRow, heads: Tensor) -> Tensor:
        """Return ``[chunk, num_heads * head_dim]``."""
        num_kv_heads = self.geometry.num_kv_heads
        queries, keys, values = torch.split(heads, [self._num_heads, num_kv_heads, num_kv_heads], dim=1)
        queries, keys, values = queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        if row.rows is not None:
            gathered = self._scratch.new_empty((len(row.rows), self._scratch.shape[1]))
            self._store.gather(row.rows + layer * self._heads_per_layer, gathered)
            keys, values = gathered.view(2, 1, num_kv_heads, -1, self.geometry.head_dim).unbind(0)
        if self._softcap is not None:
            capped = capped_attention(queries[0], keys[0], values[0], row.mask, scale=self._scale, cap=self._softcap)
            return capped.transpose(0, 1).reshape(heads.shape[0], -1)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=row.mask,
            is_causal=row.mask is None,
            scale=self._scale,
            enable_gqa=self.group_size > 1,
        )
        return attended[0].transpose(0, 1).reshape(heads.shape[0], -1)
