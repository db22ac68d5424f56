"""LoRA of steps with prefill chunks: tensor-core segments in bf16, the decode kernels in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.adapter_image import OP_INDEX
from loraplex_kernels.items import BLOCK_ROWS, GROUP_TOKENS, SHRINK_ROWS, op_shapes
from loraplex_kernels.lora_decode import LoraDecode
from loraplex_kernels.lora_prefill import TILE_TOKENS, LoraPrefill
from loraplex_kernels.prefill_cut import WAVE
from loraplex_kernels.tables import MAX_RANK

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_kernels.items import OpShape
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.tables import AdapterTables
    from torch import Tensor

    from loraplex_engine.step import StepPlan


def max_decode_items(shapes: tuple[OpShape, ...], num_groups: int) -> int:
    """Return a bound of the items of a decode step with that many groups, whatever the ranks."""
    per_group = sum(
        sum(MAX_RANK // SHRINK_ROWS * shape.num_planes + -(-outputs // BLOCK_ROWS) + 1 for outputs in shape.outputs)
        for shape in shapes
    )
    return per_group * num_groups


def max_prefill_items(shapes: tuple[OpShape, ...], num_tiles: int) -> int:
    """Return a bound of the items of a step with that many tiles of `TILE_TOKENS` tokens or fewer."""
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

    def prepare(self, plan: StepPlan) -> None:
        """Build the step's items."""
        self._kernels.prepare(plan.adapters, plan.num_tokens)

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        self._kernels.apply(layer, op, x, scales, y)


class GroupedLora:
    """Groups of at most 8 tokens of one adapter by the decode kernels: exact in fp32, slow for long prompts."""

    def __init__(
        self, library: KernelLibrary, tables: AdapterTables, pool: Tensor, geometry: Geometry, *, max_tokens: int
    ) -> None:
        shapes = op_shapes(geometry)
        max_groups = max_tokens  # every token may have its own adapter
        self._kernels = LoraDecode(
            library,
            tables,
            pool,
            shapes,
            max_rows=max_groups,
            max_items=max_decode_items(shapes, -(-max_groups // GROUP_TOKENS) + min(max_groups, 256)),
        )
        self._hidden = self._kernels.new_scratch()
        self._counts = np.zeros(2 * len(shapes), dtype=np.int32)

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._kernels.items.buffer, self._hidden)

    def prepare(self, plan: StepPlan) -> None:
        """Build the step's items."""
        self._counts = self._kernels.prepare(np.repeat(plan.adapters, plan.num_tokens)).counts

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor, scales: Tensor) -> None:
        """See `TokenLora`."""
        shrink, expand = self._counts[2 * OP_INDEX[op] : 2 * OP_INDEX[op] + 2].tolist()
        self._kernels.shrink(layer, op, x, self._hidden, shrink)
        self._kernels.expand_add(layer, op, self._hidden, scales, y, expand)


def make_token_lora(
    library: KernelLibrary,
    tables: AdapterTables,
    pool: Tensor,
    geometry: Geometry,
    *,
    max_rows: int,
    max_tokens: int,
) -> SegmentLora | GroupedLora:
    """Return what suits the element type."""
    if library.dtype == torch.bfloat16:
        return SegmentLora(library, tables, pool, geometry, max_rows=max_rows, max_tokens=max_tokens)
    return GroupedLora(library, tables, pool, geometry, max_tokens=max_tokens)
