"""LoRA of decode steps: which path a captured graph takes, and the items it reads.

With few rows, LoRA's cost is launches that wait for each other, so LoRA runs beside the products (`BesideLoraPath`).
With many rows its cost is bytes; products and LoRA side by side would only push each other out of the multiprocessors,
so LoRA runs in line, the start of each kernel hidden behind the end of the kernel before (`InLineLoraPath`). Beside FP8
products, which do not accumulate, many rows take `BesideLoraPath` in order.
Milliseconds that LoRA adds to a step, beside and in line, on one H100 with Llama-2-7B and rank 16 on all projections,
timed as `benchmarks/layers.py` does when o and down still wrote a scratch in line: 32 rows of one adapter 0.61, 0.78,
of 32 adapters 1.61, 1.53; 64 rows of one adapter 0.69, 0.86, of 64 adapters 2.90, 2.55; 256 rows of one adapter 2.67,
1.85.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_kernels.lora.chains import LoraChains, fixed_terms
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes

from loraplex_engine.runners.cuda.fork import Fork
from loraplex_engine.runners.cuda.graphs import lora_variants, variant_of
from loraplex_engine.runners.cuda.lora_grids import Grids
from loraplex_engine.runners.cuda.lora_paths import BasePath, BesideLoraPath, InLineLoraPath
from loraplex_engine.runners.cuda.part_lora import DecodeParts
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH, PART_VARIANTS
from loraplex_engine.runners.cuda.row_terms import needs_chains, row_terms, used_adapters
from loraplex_engine.runners.cuda.token_lora import max_decode_items
from loraplex_engine.step import NO_MORE_ADAPTERS

if TYPE_CHECKING:
    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.lora.tables import AdapterTables
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.followers import Followers
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.step import MoreAdapters

MAX_ROWS_BESIDE: Final = 32
DELTA_OPS: Final = frozenset({"qkv", "gate_up"})
"""Ops whose expand writes a whole delta, which the follower adds or the product accumulates onto."""


class DecodeLora:
    """The LoRA kernels of decode steps with up to ``max_rows`` rows.

    Args:
        library: Kernels.
        tables: The resident adapters, and the geometry of their images.
        pool: uint8 ``[pages, page_bytes]``.
        followers: The kernels that finish qkv and gate_up.
        max_rows: The largest bucket.
        num_sms: Multiprocessors of the device.
        max_rows_beside: Steps of up to so many rows take `BesideLoraPath`.

    Attributes:
        variants: The graphs of pairs alone that it has a path for, see `lora_variants`.
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
        max_rows_beside: int = MAX_ROWS_BESIDE,
    ) -> None:
        self._tables = tables
        self.variants = lora_variants(tables.geometry)
        self._followers = followers
        self._num_sms, self._max_rows_beside = num_sms, max_rows_beside
        self._fork, self._in_order = Fork(library.device), Fork(library.device, in_order=True)

        def kernels(rows: int, shapes: tuple[OpShape, ...]) -> LoraDecode:
            items = max_decode_items(shapes, rows)
            return LoraDecode(library, tables, pool, shapes, max_rows=rows, max_items=items)

        rows_beside, shapes = max(1, min(max_rows, max_rows_beside)), op_shapes(tables.geometry, complete=DELTA_OPS)
        self.beside = kernels(rows_beside, shapes)
        self.in_line = kernels(max_rows, shapes)
        widest = max(shape.slice_begin[-1] for shape in shapes if shape.complete)
        delta_rows = rows_beside if followers.can_accumulate else max_rows
        self._delta = torch.empty(delta_rows * widest, dtype=torch.float32, device=library.device)
        self._hidden = {lora: lora.new_scratch() for lora in (self.beside, self.in_line)}
        self._chains = {
            lora: LoraChains(library, tables, pool, shapes, max_rows=rows, max_terms=fixed_terms(rows))
            for lora, rows in ((self.beside, rows_beside), (self.in_line, max_rows))
        }
        self._hidden |= {lora: lora.new_scratch() for lora in self._chains.values()}
        self._sent: dict[LoraDecode, tuple[object, int]] = {}
        self._parts = DecodeParts(library, tables, pool, followers=followers, max_rows=max_rows, num_sms=num_sms)

    @property
    def num_variants(self) -> int:
        """The graphs that it has a path for: `variants`, then `PART_VARIANTS`, then chains of pairs."""
        return self.chain_variant + 1

    @property
    def chain_variant(self) -> int:
        """The graph of rows that add several adapters of pairs alone up, and of ranks above `PLAIN_MAX_RANK`."""
        return len(self.variants) + len(PART_VARIANTS)

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels through tables."""
        own = (self.beside.items.buffer, self.in_line.items.buffer, *self._hidden.values(), self._delta)
        of_chains = (tensor for chains in self._chains.values() for tensor in chains.fixed_tensors)
        return (*own, *of_chains, *self._parts.fixed_tensors)

    def path(self, bucket: int, variant: int) -> LayerPath:
        """Return how a graph of that many rows and that variant goes through the projections."""
        is_chained = variant == self.chain_variant
        if variant >= len(self.variants) and not is_chained:
            return self._parts.path(bucket, variant - len(self.variants))
        ops = self.variants[-1 if is_chained else variant]
        if not ops:
            return BasePath(self._followers)
        kernels = self._kernels_of(bucket)
        lora = self._chains[kernels] if is_chained else kernels
        grids = Grids.of(bucket, self._num_sms, is_chained=is_chained)
        hidden = self._hidden[lora]
        if kernels is self.in_line and self._followers.can_accumulate:
            return InLineLoraPath(self._followers, lora, hidden, grids, ops=ops)
        return BesideLoraPath(
            self._followers,
            lora,
            hidden,
            grids,
            ops=ops,
            delta=self._delta,
            fork=self._in_order if kernels is self.in_line else self._fork,
        )

    def prepare(
        self,
        adapters: NDArray[np.int32],
        bucket: int,
        num_binds: int,
        *,
        scales: NDArray[np.float32] | None = None,
        more: MoreAdapters = NO_MORE_ADAPTERS,
    ) -> int:
        """Send the items of a step, unless the device has them already; return the variant that reads them, or `NO_GRAPH`.

        A step that no graph computes gets `NO_GRAPH`: it goes the way of steps with prompts.

        Args:
            adapters: int32 ``[N]``; first adapter of each row, -1 for none.
            bucket: Bucket of the graph that will run.
            num_binds: Rises whenever an index of the tables names another adapter.
            scales: fp32 ``[N]``; the requests' factors on them; 1 if unset.
            more: Further adapters of rows.
        """
        used = adapters[adapters >= 0]
        if not used.size:
            return 0
        if len(more.rows):
            return self._prepare_chains(adapters, bucket, num_binds, scales, more)
        lora, key = self._kernels_of(bucket), (num_binds, adapters.tobytes())
        sent = self._sent.get(lora)
        if sent is None or sent[0] != key:
            if needs_chains(self._tables, used, more):
                return self._prepare_chains(adapters, bucket, num_binds, scales, more)
            if self._tables.has_others[used].any():
                number = self._parts.prepare(adapters, key)
                return number if number == NO_GRAPH else len(self.variants) + number
            lora.prepare(adapters)
            sent = self._sent[lora] = (
                key,
                variant_of(self.variants, self._tables.geometry, self._tables.max_stacked[used]),
            )
        return sent[1]

    def _prepare_chains(
        self,
        adapters: NDArray[np.int32],
        bucket: int,
        num_binds: int,
        scales: NDArray[np.float32] | None,
        more: MoreAdapters,
    ) -> int:
        if self._tables.has_others[used_adapters(adapters, more)].any():
            return NO_GRAPH
        chains = self._chains[self._kernels_of(bucket)]
        factors = np.ones(len(adapters), dtype=np.float32) if scales is None else scales
        arrays = (adapters, factors, more.rows, more.adapters, more.scales)
        key = (num_binds, *(array.tobytes() for array in arrays))
        sent = self._sent.get(chains)
        if sent is None or sent[0] != key:
            fits = chains.prepare_terms(row_terms(adapters, factors, more)) is not None
            sent = self._sent[chains] = key, self.chain_variant if fits else NO_GRAPH
        return sent[1]

    def _kernels_of(self, bucket: int) -> LoraDecode:
        return self.beside if bucket <= self._max_rows_beside else self.in_line
