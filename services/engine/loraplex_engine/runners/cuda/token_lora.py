"""LoRA of steps with prefill chunks: in bf16 tensor-core segments, beside many decode rows in groups; in fp32 all in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import BLOCK_ROWS, GROUP_TOKENS, SHRINK_ROWS, op_shapes
from loraplex_kernels.lora.prefill import TILE_TOKENS, LoraPrefill
from loraplex_kernels.lora.prefill_cut import WAVE
from loraplex_kernels.lora.tables import MAX_RANK

from loraplex_engine.decode_runs import count_runs, takes_decode_kernels
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.lora_paths import TokenLora
    from loraplex_engine.step import StepPlan


def max_decode_items(shapes: tuple[OpShape, ...], num_groups: int) -> int:
    """Return an upper bound of the items of a decode step with that many groups, whatever the ranks."""
    per_group = sum(
        sum(MAX_RANK // SHRINK_ROWS * shape.num_planes + -(-outputs // BLOCK_ROWS) + 1 for outputs in shape.outputs)
        for shape in shapes
    )
    return per_group * num_groups


def max_prefill_items(shapes: tuple[OpShape, ...], num_tiles: int) -> int:
    """Return an upper bound of the items of a step with that many tiles of at most `TILE_TOKENS` tokens."""
    return sum(max(len(shape.outputs) * num_tiles, WAVE) for shape in shapes)


class SegmentLora:
    """Runs of tokens of one adapter on tensor cores, bf16; decode rows are runs of one token."""

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: Tensor,
        geometry: Geometry,
        *,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        shapes = op_shapes(geometry)
        max_tiles = max_rows + -(-max_tokens // TILE_TOKENS)
        self._kernels = LoraPrefill(library, tables, pool, shapes, max_items=max_prefill_items(shapes, max_tiles))

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._kernels.buffer,)

    def prepare(self, plan: StepPlan, first_row: int = 0) -> None:
        """Build the items of the step's rows, without the first ``first_row`` rows, which have one token each."""
        self._kernels.prepare(plan.adapters[first_row:], plan.num_tokens[first_row:], first_row)

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        self._kernels.apply(layer, op, x, scales, y)


class GroupedLora:
    """Groups of at most 8 tokens of one adapter by the decode kernels: exact in fp32, slow for long prompts.

    Args:
        library: Kernels.
        tables: The resident adapters.
        pool: uint8 ``[pages, page_bytes]``.
        geometry: Geometry of adapter images.
        max_tokens: Most tokens of a step.
        max_groups: Most groups of a step.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: Tensor,
        geometry: Geometry,
        *,
        max_tokens: int,
        max_groups: int,
    ) -> None:
        shapes = op_shapes(geometry)
        self._tables = tables
        self._kernels = LoraDecode(
            library,
            tables,
            pool,
            shapes,
            max_rows=max_tokens,  # every token may have its own adapter
            max_items=max_decode_items(shapes, max_groups),
        )
        self._hidden = self._kernels.new_scratch()
        self._grids: dict[int, tuple[int, int]] = {}  # by index of the op

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._kernels.items.buffer, self._hidden)

    def prepare(self, plan: StepPlan) -> None:
        """Build the step's items."""
        self.prepare_tokens(np.repeat(plan.adapters, plan.num_tokens))

    def prepare_tokens(self, adapters: NDArray[np.int32], tokens: NDArray[np.int32] | None = None) -> None:
        """Build the items of some tokens.

        Args:
            adapters: int32 ``[N]``; adapter of each token, -1 for none.
            tokens: int32 ``[N]``; their numbers in the step, below ``max_tokens``; 0..N-1 if unset.
        """
        counts = self._kernels.prepare(adapters, tokens).counts.reshape(-1, 2).tolist()
        self._grids = {index: (shrink, expand) for index, (shrink, expand) in enumerate(counts) if expand}

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        grids = self._grids.get(self._tables.op_index(layer, op))
        if grids is None:
            return
        shrink, expand = grids
        self._kernels.shrink(layer, op, x, self._hidden, shrink)
        self._kernels.expand_add(layer, op, self._hidden, scales, y, expand)


class SplitLora:
    """Decode rows in groups and chunks in segments, bf16; if the decode rows are few, they are segments too.

    Groups and segments are disjoint rows of an output, so their kernels may run in either order.

    Args:
        segments: Takes any step.
        groups: Takes as many tokens as a step has sequences; `DecodeLora`'s buffers belong to graphs and cannot serve
            here.
        min_decode_runs: If decode rows make fewer runs of one adapter, they are segments.
    """

    def __init__(self, segments: SegmentLora, groups: GroupedLora, *, min_decode_runs: int) -> None:
        self._segments, self._groups, self._min_decode_runs = segments, groups, min_decode_runs
        self._parts: tuple[TokenLora, ...] = ()

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (*self._segments.fixed_tensors, *self._groups.fixed_tensors)

    def prepare(self, plan: StepPlan) -> None:
        """Build the step's items, for segments, groups or both."""
        decoding = plan.adapters[: plan.num_decode_rows]
        num_runs = count_runs(decoding)  # as many segments, unless a run is long
        has_groups = takes_decode_kernels(num_runs, has_prefill=True, min_runs=self._min_decode_runs)
        first_row = plan.num_decode_rows if has_groups else 0
        has_segments = bool((plan.adapters[first_row:] >= 0).any())
        if has_groups:
            rows = np.flatnonzero(decoding != NO_ADAPTER).astype(np.int32)
            self._groups.prepare_tokens(decoding[rows], rows)  # decode rows come first, with one token each
        if has_segments:
            self._segments.prepare(plan, first_row)
        self._parts = (self._groups,) * has_groups + (self._segments,) * has_segments

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        for part in self._parts:
            part.apply(layer, op, x, y, scales)


def make_token_lora(
    library: KernelLibrary,
    tables: AdapterTables,
    pool: Tensor,
    geometry: Geometry,
    *,
    max_rows: int,
    max_tokens: int,
    min_decode_runs: int,
) -> GroupedLora | SplitLora:
    """Return the class that suits the element type."""
    if library.dtype != torch.bfloat16:
        max_groups = max_tokens // GROUP_TOKENS + max_rows  # each sequence may end in a group of its own
        return GroupedLora(library, tables, pool, geometry, max_tokens=max_tokens, max_groups=max_groups)
    segments = SegmentLora(library, tables, pool, geometry, max_rows=max_rows, max_tokens=max_tokens)
    groups = GroupedLora(library, tables, pool, geometry, max_tokens=max_rows, max_groups=max_rows)
    return SplitLora(segments, groups, min_decode_runs=min_decode_runs)
