"""LoRA for prefill chunks: tensor-core shrink and expand over ragged runs of tokens of one adapter, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_image import OP_INDEX

from loraplex_kernels.items import HEADER_INTS, ITEM_INTS, OpShape, range_index, within_runs
from loraplex_kernels.params import LoraTables, PrefillExpandParams, PrefillShrinkParams
from loraplex_kernels.tables import MAX_STACKED_RANK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.tables import AdapterTables

BLOCK: Final = 128
TILE_TOKENS: Final = 64  # kTokens
RANK_BLOCK: Final = 64  # kBlockRows
RUN: Final = 512
EXPAND_SHARED_BYTES: Final = 60 * 1024  # two stages of B, and h
CHUNK: Final = 1024  # kChunk: columns of a plane of h
SHRINK_SHARED_BYTES: Final = 64 * 1024  # 4 stages of x and A


def num_planes(shape: OpShape) -> int:
    """Return how many planes of h the shrink writes."""
    return -(-shape.columns // CHUNK)


def make_segments(adapters: NDArray[np.int32], counts: NDArray[np.int32], first_token: int) -> NDArray[np.int32]:
    """Cut consecutive chunks into tiles of at most 64 tokens of one adapter.

    Args:
        adapters: int32 ``[N]``; adapter of each chunk, -1 for none.
        counts: int32 ``[N]``; tokens of each chunk, one after another.
        first_token: Row of the first chunk's first token.

    Returns:
        int32 ``[tiles, 3]``: first token, tokens, adapter. Neighbouring chunks of one adapter share tiles; chunks
        without one have none.
    """
    starts = np.flatnonzero(np.diff(adapters, prepend=np.int32(-2)) != 0)
    totals = np.add.reduceat(counts, starts).astype(np.int64) if len(starts) else np.zeros(0, dtype=np.int64)
    begins = first_token + np.cumsum(totals) - totals
    owners = adapters[starts]
    totals = np.where(owners >= 0, totals, 0)
    tiles = -(-totals // TILE_TOKENS)
    run, within = np.repeat(np.arange(len(starts)), tiles), within_runs(tiles)
    segments = np.empty((len(run), 3), dtype=np.int32)
    segments[:, 0] = begins[run] + within * TILE_TOKENS
    segments[:, 1] = np.minimum(TILE_TOKENS, totals[run] - within * TILE_TOKENS)
    segments[:, 2] = owners[run]
    return segments


def _items(segments: NDArray[np.int32], parts: NDArray[np.int64]) -> NDArray[np.int32]:
    tile = np.repeat(np.arange(len(segments)), parts)
    return np.concatenate([segments[tile], within_runs(parts)[:, None].astype(np.int32)], axis=1)


def build_items(
    segments: NDArray[np.int32], max_stacked: NDArray[np.int32], shapes: tuple[OpShape, ...], run: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return a step's buffer (header of ranges, then items) and the items by `range_index`.

    Args:
        segments: From `make_segments`.
        max_stacked: `AdapterTables.max_stacked`.
        shapes: Of the four ops.
        run: Outputs per expand item.
    """
    header, counts = np.zeros(HEADER_INTS, dtype=np.int32), np.zeros(2 * len(shapes), dtype=np.int32)
    parts: list[NDArray[np.int32]] = []
    first = 0
    for op, shape in enumerate(shapes):
        stacked = max_stacked[segments[:, 2], op].astype(np.int64)
        runs = sum(-(-outputs // run) for outputs in shape.outputs)
        for number in (-(-stacked // RANK_BLOCK) * num_planes(shape), np.where(stacked > 0, runs, 0)):
            items, index = _items(segments, number), len(parts)
            header[2 * index : 2 * index + 2] = first, len(items)
            counts[index] = len(items)
            first += len(items)
            parts.append(items.reshape(-1))
    return np.concatenate([header, *parts]), counts


class LoraPrefill:
    """The LoRA kernels of prefill chunks.

    Args:
        library: Compiles and loads them; bf16.
        tables: The resident adapters.
        pool: uint8 ``[num_pages, page_bytes]``; the unified pool.
        shapes: Of the four ops.
        max_items: Most items of a step.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: torch.Tensor,
        shapes: tuple[OpShape, ...],
        *,
        max_items: int,
    ) -> None:
        self._library, self._tables, self._shapes = library, tables, shapes
        self._pinned = library.device.type == "cuda"
        size = HEADER_INTS + max_items * ITEM_INTS
        self.buffer = torch.zeros(size, dtype=torch.int32, device=library.device)
        self._counts = np.zeros(2 * len(shapes), dtype=np.int32)
        self._shrink = library.load(
            "lora_prefill_shrink",
            PrefillShrinkParams(),
            BLOCK,
            defines=(f"SHARED_BYTES={SHRINK_SHARED_BYTES}",),
            shared_bytes=SHRINK_SHARED_BYTES,
        )
        self._expand = library.load(
            "lora_prefill_expand",
            PrefillExpandParams(),
            BLOCK,
            defines=(f"RUN={RUN}", f"SHARED_BYTES={EXPAND_SHARED_BYTES}"),
            shared_bytes=EXPAND_SHARED_BYTES,
        )
        for lora in (self._shrink.params.lora, self._expand.params.lora):
            lora.pool, lora.tiles, lora.entry_stride = pool.data_ptr(), tables.tiles.data_ptr(), tables.entry_stride

    def new_scratch(self, tokens: int) -> torch.Tensor:
        """Allocate an h: fp32 ``[planes, tokens, 256]``."""
        planes = max(num_planes(shape) for shape in self._shapes)
        return torch.empty(planes, tokens, MAX_STACKED_RANK, dtype=torch.float32, device=self._library.device)

    def prepare(self, adapters: NDArray[np.int32], counts: NDArray[np.int32], first_token: int = 0) -> None:
        """Build a step's items and copy them to the device on the current stream; all layers use them.

        Args:
            adapters: int32 ``[N]``; adapter of each chunk, -1 for none.
            counts: int32 ``[N]``; tokens of each chunk, one after another.
            first_token: Row of the first chunk's first token.

        Raises:
            ValueError: If the items exceed the buffer.
        """
        segments = make_segments(adapters, counts, first_token)
        built, self._counts = build_items(segments, self._tables.max_stacked, self._shapes, RUN)
        if len(built) > len(self.buffer):
            raise ValueError(f"{len(built)} ints of items exceed {len(self.buffer)}")
        host = torch.from_numpy(built)
        self.buffer[: len(built)].copy_(host.pin_memory() if self._pinned else host, non_blocking=self._pinned)

    def shrink(self, layer: int, op: str, x: torch.Tensor, h: torch.Tensor) -> None:
        """Compute ``h[plane][t] = x[t, chunk] @ A[:, chunk].T`` for the step's chunks.

        Args:
            layer: Decoder layer.
            op: One of ``OPS``.
            x: ``[tokens, in_features]``.
            h: From `new_scratch`.
        """
        params, shape = self._shrink.params, self._shapes[OP_INDEX[op]]
        params.x = self._library.check("x", x, self._library.dtype, -1, shape.columns)
        params.h, params.h_plane, params.h_stride = h.data_ptr(), h.stride(0), h.stride(1)
        params.columns, params.num_planes = shape.columns, num_planes(shape)
        self._kernel_tables(params.lora, layer, op, expand=False)
        self._shrink.launch(int(self._counts[range_index(op, expand=False)]))

    def expand_add(self, layer: int, op: str, h: torch.Tensor, scale: torch.Tensor, y: torch.Tensor) -> None:
        """Compute ``y[t] += scaling * scale[t] * sum(h[:, t]) @ B.T`` for the step's chunks.

        Args:
            layer: Decoder layer.
            op: One of ``OPS``.
            h: What `shrink` wrote.
            scale: fp32 ``[tokens]``.
            y: ``[tokens, out_features of all slices]``, updated in place.
        """
        params, shape = self._expand.params, self._shapes[OP_INDEX[op]]
        begin = shape.slice_begin
        params.y = self._library.check("y", y, self._library.dtype, -1, begin[-1])
        params.y_stride = begin[-1]
        params.scale = self._library.check("scale", scale, torch.float32, -1)
        params.h, params.h_plane, params.h_stride = h.data_ptr(), h.stride(0), h.stride(1)
        params.num_planes = num_planes(shape)
        params.slice_begin[:] = [*begin, *[begin[-1]] * (4 - len(begin))]
        self._kernel_tables(params.lora, layer, op, expand=True)
        self._expand.launch(int(self._counts[range_index(op, expand=True)]))

    def _kernel_tables(self, lora: LoraTables, layer: int, op: str, *, expand: bool) -> None:
        lora.entries = self._tables.entry_address(layer, op)
        lora.range = self.buffer.data_ptr() + 8 * range_index(op, expand=expand)
        lora.items = self.buffer.data_ptr() + 4 * HEADER_INTS
