"""Decode steps and steps with prompts whose adapters have other parts than pairs: what is sent for them, and their paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.finish_norm import FinishNorm
from loraplex_kernels.lora.flora import LoraFlora
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.sparse import LoraSparse
from loraplex_kernels.lora.vectors import LoraVectors, RowAdapters
from loraplex_kernels.pointwise.rms_norm import rms_norm_build

from loraplex_engine.runners.cuda.lora_grids import Grids
from loraplex_engine.runners.cuda.lora_paths import AddedLoraPath
from loraplex_engine.runners.cuda.part_paths import DecodePartPath, PartKernels, PartPass, TokenPartPath
from loraplex_engine.runners.cuda.part_variants import (
    NO_GRAPH,
    PART_VARIANTS,
    PartVariant,
    needed_parts,
    part_variant_of,
)
from loraplex_engine.runners.cuda.row_terms import PassScales, row_passes, used_adapters
from loraplex_engine.runners.cuda.token_lora import max_decode_items

if TYPE_CHECKING:
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.followers import Followers, NormShape
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.token_lora import GroupedLora, SplitLora
    from loraplex_engine.step import StepPlan


def make_part_kernels(
    library: KernelLibrary,
    tables: AdapterTables,
    pool: Tensor,
    *,
    max_rows: int,
    num_sms: int,
    in_graphs: bool = False,
    num_passes: int = 1,
    norm: NormShape | None = None,
) -> PartKernels:
    """Return the kernels of all parts but pairs for steps of up to ``max_rows`` rows, of FLoRA for steps without a graph.

    Rows have up to ``num_passes`` adapters each. ``norm`` stands behind o and down.
    """
    shapes = op_shapes(tables.geometry)
    sparse = LoraSparse(library, tables, pool, shapes, max_rows=max_rows, num_sms=num_sms)
    sparse.reserve_passes(num_passes)
    return PartKernels(
        LoraVectors(library, tables, pool, shapes),
        sparse,
        RowAdapters(max_rows, library.device),
        None if in_graphs else LoraFlora(library, tables, pool, shapes, max_rows=max_rows),
        tuple(RowAdapters(max_rows, library.device) for _ in range(1, num_passes)),
        None if norm is None else _finish_norm(library, tables, pool, norm),
    )


def _finish_norm(library: KernelLibrary, tables: AdapterTables, pool: Tensor, norm: NormShape) -> FinishNorm:
    build = rms_norm_build(norm.hidden_size, library.dtype)
    return FinishNorm(library, tables, pool, hidden_size=norm.hidden_size, build=build, eps=norm.eps)


class DecodeParts:
    """The kernels of decode steps with parts besides pairs; see `DecodeLora` for the arguments.

    Its items and scratches are its own, so that graphs of plain LoRA find theirs as they were.
    """

    def __init__(
        self,
        library: KernelLibrary,
        tables: AdapterTables,
        pool: Tensor,
        *,
        followers: Followers,
        max_rows: int,
        num_sms: int,
    ) -> None:
        self._tables, self._followers, self._num_sms = tables, followers, num_sms
        every = frozenset(op.name for op in tables.geometry.decoder_ops)
        shapes = op_shapes(tables.geometry, complete=every)
        items = max_decode_items(shapes, max_rows)
        self._lora = LoraDecode(library, tables, pool, shapes, max_rows=max_rows, max_items=items)
        self._hidden = self._lora.new_scratch()
        self._parts = make_part_kernels(
            library, tables, pool, max_rows=max_rows, num_sms=num_sms, in_graphs=True, norm=followers.norm
        )
        self._sent: tuple[object, int] | None = None

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        return (self._lora.items.buffer, self._hidden, *self._parts.fixed_tensors)

    def path(self, bucket: int, variant: int) -> LayerPath:
        """Return how a graph of that many rows and that one of `PART_VARIANTS` goes through the projections."""
        grids = Grids.of(bucket, self._num_sms)
        return DecodePartPath(
            self._followers, self._lora, self._hidden, grids, parts=self._parts, variant=PART_VARIANTS[variant]
        )

    def prepare(self, adapters: NDArray[np.int32], key: object) -> int:
        """Send what a step's kernels read, unless the device has it already; return the variant that computes it.

        It sends nothing for a step that no graph computes, and returns `NO_GRAPH`.

        Args:
            adapters: int32 ``[N]``; adapter of each row, -1 for none.
            key: Differs whenever the adapters, or what their indices name, do.
        """
        if self._sent is not None and self._sent[0] == key:
            return self._sent[1]
        number = part_variant_of(needed_parts(self._tables, adapters[adapters >= 0]))
        if number == NO_GRAPH:
            return number
        variant = PART_VARIANTS[number]
        if variant.has_pairs:
            self._lora.prepare(adapters)
        if variant.scales_inputs or variant.finishes:
            self._parts.rows.upload(adapters)
        if variant.has_sparse:
            self._parts.sparse.prepare(adapters)
        self._sent = key, number
        return number


class TokenParts:
    """The paths of steps with prefill chunks, whatever parts their adapters have.

    Args:
        token_lora: The pairs.
        tables: The resident adapters.
        followers: The kernels behind qkv and gate_up.
        parts: The other kernels, for as many rows as a step has tokens.
    """

    def __init__(
        self, token_lora: GroupedLora | SplitLora, tables: AdapterTables, followers: Followers, parts: PartKernels
    ) -> None:
        self._token_lora, self._tables, self._followers, self._parts = token_lora, tables, followers, parts
        self._added = AddedLoraPath(followers, token_lora)
        self._scales = PassScales(len(parts.rows.buffer), parts.rows.buffer.device)

    def prepare(self, plan: StepPlan) -> LayerPath:
        """Send what the kernels of a step with adapters read; return its path."""
        used = np.unique(used_adapters(plan.adapters, plan.more_adapters))
        if not self._tables.has_others[used].any():
            self._token_lora.prepare(plan)
            return self._added
        needs = needed_parts(self._tables, used)
        adapters = np.repeat(plan.adapters, plan.num_tokens)
        if needs.has_pairs:
            self._token_lora.prepare(plan)
        if needs.scales_inputs or needs.finishes:
            self._parts.rows.upload(adapters)
        if needs.has_sparse:
            self._parts.sparse.prepare(adapters)
        if needs.has_flora:
            assert self._parts.flora is not None
            self._parts.flora.prepare(adapters)
        more = self._prepare_more(plan) if len(plan.more_adapters.rows) else []
        return TokenPartPath(self._followers, self._token_lora, self._parts, self._op_needs(used), more)

    def _prepare_more(self, plan: StepPlan) -> list[PartPass]:
        """Send b and S of further adapters of rows, a pass for each place in their lists."""
        passes, has, found = row_passes(plan.more_adapters, len(plan.slots)), self._tables.has_part, []
        for number, scales in enumerate(self._scales.upload(passes, plan.num_tokens)):
            adapters = np.repeat(passes[number].adapters, plan.num_tokens)
            used = adapters[adapters >= 0]
            adds_bias, has_sparse = (bool(has[kind][used].any()) for kind in (BIAS, SPARSE_DELTA))
            if adds_bias:
                self._parts.more_rows[number].upload(adapters)
            if has_sparse:
                self._parts.sparse.prepare(adapters, number=number + 1)
            found.append(PartPass(scales, adds_bias, has_sparse))
        return found

    def _op_needs(self, used: NDArray[np.int32]) -> list[dict[str, PartVariant]]:
        geometry = self._tables.geometry
        of_op = [needed_parts(self._tables, used, index) for index in range(geometry.num_decoder_ops)]
        return [
            {name: of_op[index] for name, index in geometry.op_indices(layer).items()}
            for layer in range(geometry.num_decoder_layers)
        ]
