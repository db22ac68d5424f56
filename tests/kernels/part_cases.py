"""Adapters of every kind of part in pages of a pool, and what their modules compute, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kernels.kernel_cases import round_to
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors, layout, pack
from loraplex_common.flora import FLORA, Flora
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, Bias, InVector, OutVector
from loraplex_kernels import reference
from numpy.typing import NDArray
from support.decoder_shapes import OPS, PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.adapter_image import Geometry
    from loraplex_common.part_kind import Arrays, Part


@dataclass(frozen=True)
class PartAdapter:
    """One adapter: its spec, pages and tensors, fp32 values that their image entries hold exactly."""

    spec: AdapterSpec
    pages: NDArray[np.int32]
    tensors: Tensors


def random_csr(outputs: int, columns: int, density: float, rng: np.random.Generator) -> Arrays:
    """Return values, columns and starts of a random sparse matrix; some outputs have none, one has as many as it can."""
    dense = rng.random((outputs, columns)) < density * rng.choice([0.0, 1.0, 1.0, 2.5], size=(outputs, 1))
    dense[int(rng.integers(outputs))] = True
    starts = np.concatenate([[0], np.cumsum(dense.sum(1))]).astype(np.int32)
    where = np.nonzero(dense)[1].astype(np.int32)
    return rng.standard_normal(len(where), dtype=np.float32) / np.float32(np.sqrt(columns)), where, starts


class PartPool:
    """A host pool with adapters of any parts packed at random pages, the rest poisoned.

    Args:
        geometry: Geometry of their images.
        num_pages: Pages of the pool.
        rng: Draws pages and values.
    """

    def __init__(self, geometry: Geometry, num_pages: int, rng: np.random.Generator) -> None:
        self.geometry, self._rng = geometry, rng
        self.pages = rng.integers(0, 256, (num_pages, geometry.page_bytes), dtype=np.uint8)
        self._free = [int(page) for page in rng.permutation(num_pages)]
        self.adapters: list[PartAdapter] = []

    def add(
        self,
        kinds: Iterable[str],
        projections: tuple[str, ...] = PROJECTIONS,
        *,
        rank: int = 8,
        density: float = 0.02,
        counts: tuple[int, ...] = (),
    ) -> PartAdapter:
        """Pack an adapter whose modules have parts of these kinds, in every layer.

        Args:
            kinds: Kinds of parts.
            projections: The modules.
            rank: Rank of pairs and of FLoRA.
            density: Share of non-zeros in sparse deltas.
            counts: Non-zeros of a sparse delta's outputs, in turn; random ones of that density if empty.
        """
        modules, tensors = [], dict[tuple[int, str, str], Any]()
        for layer in range(self.geometry.num_decoder_layers):
            shared = dict[int, Any]()
            for name in sorted(projections, key=PROJECTIONS.index):
                parts: list[Part] = []
                for kind in kinds:
                    part, arrays = self._part(kind, layer, name, rank, density)
                    if kind == SPARSE_DELTA and counts:
                        part, arrays = self._sparse(layer, name, counts)
                    if kind == IN_VECTOR:
                        arrays = shared.setdefault(self.geometry.place(layer, name)[0], arrays)
                    parts.append(part)
                    tensors[layer, name, kind] = arrays
                modules.append(ModuleSpec(layer, name, tuple(parts)))
        spec = AdapterSpec(f"{len(self.adapters):064x}", tuple(modules))
        count = layout(self.geometry, spec.sizes).num_pages
        pages = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
        self.pages[pages] = pack(self.geometry, spec, tensors)
        self.adapters.append(PartAdapter(spec, pages, tensors))
        return self.adapters[-1]

    def _sparse(self, layer: int, name: str, counts: tuple[int, ...]) -> tuple[SparseDelta, Arrays]:
        columns, outputs = self.geometry.projection(layer, name).shape
        sizes = np.minimum(np.resize(counts, outputs), columns)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        where = np.concatenate([np.sort(self._rng.choice(columns, size, replace=False)) for size in sizes.tolist()])
        values = round_to(self._rng.standard_normal(len(where), dtype=np.float32), self.geometry.dtype)
        return SparseDelta(len(where), 0.25), (values, where.astype(np.int32), starts)

    def _part(self, kind: str, layer: int, name: str, rank: int, density: float) -> tuple[Part, Arrays]:
        rng, dtype = self._rng, self.geometry.dtype
        columns, outputs = self.geometry.projection(layer, name).shape
        if kind == LOW_RANK:
            a = rng.standard_normal((rank, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
            b = rng.standard_normal((outputs, rank), dtype=np.float32) * np.float32(0.5 / np.sqrt(rank))
            return LowRank(rank, float(0.5 + rng.random())), (round_to(a, dtype), round_to(b, dtype))
        if kind == FLORA:
            a, b = rng.standard_normal((rank, columns)), rng.standard_normal((outputs, rank)) / np.sqrt(rank)
            return Flora(rank), (a.astype(np.float32), b.astype(np.float32))
        if kind == SPARSE_DELTA:
            values, where, starts = random_csr(outputs, columns, density, rng)
            return SparseDelta(len(values), float(0.5 + rng.random())), (round_to(values, dtype), where, starts)
        if kind == OUT_VECTOR:
            scales_bias = len(self.adapters) % 2 == 1
            return OutVector(scales_bias=scales_bias), (rng.uniform(-1.5, 1.5, outputs).astype(np.float32),)
        if kind == IN_VECTOR:
            return InVector(), (rng.uniform(-1.5, 1.5, columns).astype(np.float32),)
        assert kind == BIAS
        return Bias(), (rng.standard_normal(outputs, dtype=np.float32),)

    def output(
        self,
        adapters: NDArray[np.int32],
        scales: NDArray[np.float32],
        x: torch.Tensor,
        weight: torch.Tensor,
        base_bias: torch.Tensor | None,
        at: tuple[int, str],
    ) -> torch.Tensor:
        """Return an op's output, fp32 ``[rows, outputs]``: c * (W (e * x) + s B A x) + S x + b, row by row; of FLoRA with
        W o B A in the place of W.

        Args:
            adapters: Adapter of each row, -1 for none.
            scales: The requests' factors.
            x: ``[rows, in_features]``.
            weight: ``[outputs, in_features]``.
            base_bias: ``[outputs]``.
            at: Layer and op.
        """
        out = torch.empty(len(adapters), len(weight), dtype=torch.float32)
        bias = torch.zeros(len(weight)) if base_bias is None else base_bias.float()
        for row, (adapter, scale) in enumerate(zip(adapters.tolist(), scales.tolist(), strict=True)):
            begin = 0
            for name in OPS[at[1]]:
                end = begin + self.geometry.projection(at[0], name).shape[1]
                own, kept = weight[begin:end].float(), bias[begin:end]
                if adapter < 0:
                    out[row, begin:end] = own @ x[row].float() + kept
                else:
                    out[row, begin:end] = self._module(adapter, (at[0], name), scale, x[row : row + 1], own, kept)[0]
                begin = end
        return out

    def _module(
        self, adapter: int, at: tuple[int, str], scale: float, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        resident = self.adapters[adapter]
        parts = {part.kind: part for m in resident.spec.modules if (m.layer, m.projection) == at for part in m.parts}
        tensors = {kind: [torch.from_numpy(array) for array in resident.tensors[*at, kind]] for kind in parts}
        e = tensors[IN_VECTOR][0] if IN_VECTOR in parts else torch.ones(x.shape[1])
        if FLORA in parts:
            a, b = tensors[FLORA]
            weight = weight * (b @ a)
        y = (e * x.float()) @ weight.T
        if isinstance(pair := parts.get(LOW_RANK), LowRank):
            a, b = tensors[LOW_RANK]
            y = y + reference.lora_delta(x, a, b, scale * pair.scaling)
        c = tensors[OUT_VECTOR][0] if OUT_VECTOR in parts else torch.ones(y.shape[1])
        factor = parts.get(OUT_VECTOR)
        y = c * (y + bias) if isinstance(factor, OutVector) and factor.scales_bias else c * y + bias
        if isinstance(delta := parts.get(SPARSE_DELTA), SparseDelta):
            values, columns, starts = tensors[SPARSE_DELTA]
            y = y + scale * delta.scaling * reference.sparse_product(x, values, columns, starts)
        return y + scale * tensors[BIAS][0] if BIAS in parts else y
