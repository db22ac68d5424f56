"""LoRA of steps with prefill chunks: in bf16 tensor-core segments, beside many decode rows in groups; in fp32 all in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_kernels.lora.chains import LoraChains
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import BLOCK_ROWS, GROUP_TOKENS, SHRINK_ROWS, op_shapes
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.lora.prefill_cut import WAVE
from loraplex_kernels.lora.prefill_shape import TILE_TOKENS
from loraplex_kernels.lora.tables import PLAIN_MAX_RANK

from loraplex_engine.decode_runs import count_runs, takes_decode_kernels
from loraplex_engine.runners.cuda.row_terms import (
    PassScales,
    needs_chains,
    row_passes,
    row_terms,
    rows_of,
    token_terms,
    used_adapters,
)
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_kernels.lora.chain_items import Terms
    from loraplex_kernels.lora.items import ItemRanges, OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.lora_paths import TokenLora
    from loraplex_engine.step import StepPlan


def max_decode_items(shapes: tuple[OpShape, ...], num_groups: int) -> int:
    """Return an upper bound of the items of a decode step with that many groups, whatever the ranks of `LoraDecode`."""
    per_group = sum(
        sum(
            PLAIN_MAX_RANK // SHRINK_ROWS * shape.num_planes + -(-outputs // BLOCK_ROWS) + 1
            for outputs in shape.outputs
        )
        for shape in shapes
    )
    return per_group * num_groups


def max_prefill_items(shapes: tuple[OpShape, ...], num_tiles: int) -> int:
    """Return an upper bound of the items of a step with that many tiles of at most `TILE_TOKENS` tokens."""
    return sum(max(len(shape.outputs) * num_tiles, WAVE) for shape in shapes)


class SegmentLora:
    """Runs of tokens of one adapter on tensor cores, bf16; decode rows are runs of one token.

    Rows with several adapters take a pass for each place in their lists: a launch an op more, and y read and written once more
    by these rows' tokens.
    """

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
        self._scales = PassScales(max_tokens, library.device)
        self._more: list[Tensor] = []

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._kernels.buffer,)

    def prepare(self, plan: StepPlan, first_row: int = 0) -> None:
        """Build the items of the step's rows, without the first ``first_row`` rows, which have one token each."""
        lengths, num_rows = plan.num_tokens, len(plan.slots)
        passes = (
            row_passes(rows_of(plan.more_adapters, first_row, num_rows), num_rows)
            if len(plan.more_adapters.rows)
            else []
        )
        lists = [plan.adapters[first_row:], *(each.adapters[first_row:] for each in passes)]
        self._kernels.prepare_passes(lists, lengths[first_row:], first_row)
        self._more = self._scales.upload(passes, lengths)

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        self._kernels.apply(layer, op, x, scales, y)
        for number, factors in enumerate(self._more, start=1):
            self._kernels.apply(layer, op, x, factors, y, number=number)


class GroupedLora:
    """Groups of at most 8 tokens of one adapter by the decode kernels: exact in fp32, slow for long prompts.

    Args:
        library: Kernels.
        tables: The resident adapters.
        pool: uint8 ``[pages, page_bytes]``.
        geometry: Geometry of adapter images.
        max_tokens: Most tokens of a step.
        max_groups: Most groups of a step.

    Attributes:
        tables: The resident adapters.
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
        self.tables = tables
        self._kernels = LoraDecode(
            library,
            tables,
            pool,
            shapes,
            max_rows=max_tokens,  # every token may have its own adapter
            max_items=max_decode_items(shapes, max_groups),
        )
        self._hidden = self._kernels.new_scratch()
        self._chains = LoraChains(library, tables, pool, shapes, max_rows=1, max_terms=1, grows=True)
        self._chain_hidden = self._chains.new_scratch()
        self._is_chained = False
        self._grids: dict[int, tuple[int, int]] = {}  # by index of the op

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._kernels.items.buffer, self._hidden)

    def prepare(self, plan: StepPlan) -> None:
        """Build the step's items."""
        more = plan.more_adapters
        if needs_chains(self.tables, used_adapters(plan.adapters, more), more):
            self.prepare_terms(token_terms(plan))
        else:
            self.prepare_tokens(np.repeat(plan.adapters, plan.num_tokens))

    def prepare_terms(self, terms: Terms) -> None:
        """Build the items of the step's first tokens, which may have several adapters each, of any rank."""
        built = self._chains.prepare_terms(terms)
        assert built is not None
        self._chain_hidden = self._chains.scratch_for(len(terms.adapters), self._chain_hidden)
        self._keep_grids(built, is_chained=True)

    def prepare_tokens(self, adapters: NDArray[np.int32], tokens: NDArray[np.int32] | None = None) -> None:
        """Build the items of some tokens.

        Args:
            adapters: int32 ``[N]``; adapter of each token, -1 for none.
            tokens: int32 ``[N]``; their numbers in the step, below ``max_tokens``; 0..N-1 if unset.
        """
        self._keep_grids(self._kernels.prepare(adapters, tokens), is_chained=False)

    def _keep_grids(self, built: ItemRanges, *, is_chained: bool) -> None:
        counts = built.counts.reshape(-1, 2).tolist()
        self._grids = {index: (shrink, expand) for index, (shrink, expand) in enumerate(counts) if expand}
        self._is_chained = is_chained

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        grids = self._grids.get(self.tables.op_index(layer, op))
        if grids is None:
            return
        shrink, expand = grids
        kernels, hidden = (self._chains, self._chain_hidden) if self._is_chained else (self._kernels, self._hidden)
        kernels.shrink(layer, op, x, hidden, shrink)
        kernels.expand_add(layer, op, hidden, scales, y, expand)


class SplitLora:
    """Decode rows in groups and chunks in segments, bf16; if the decode rows are few, they are segments too.

    Groups and segments are disjoint rows of an output, so their kernels may run in either order. Decode rows with several
    adapters are always in groups, which add them up in one launch.

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
        more = rows_of(plan.more_adapters, 0, plan.num_decode_rows)
        has_groups |= len(more.rows) > 0
        first_row = plan.num_decode_rows if has_groups else 0
        has_segments = bool((plan.adapters[first_row:] >= 0).any())
        if has_groups and needs_chains(self._groups.tables, used_adapters(decoding), more):
            self._groups.prepare_terms(row_terms(decoding, plan.adapter_scales[: len(decoding)], more))
        elif has_groups:
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
