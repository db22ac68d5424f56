"""What a module computes, by the formula of ADR 26 in plain numpy, and random adapters of every kind of part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, Geometry, ModuleSpec, Tensors, from_bfloat16, to_bfloat16
from loraplex_common.flora import FLORA, Flora
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, Bias, InVector, OutVector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.part_kind import Arrays, Part
    from numpy.typing import NDArray

    Matrix = NDArray[np.floating]

DORA, IA3_OUT = "dora", "ia3_out"
PART_NAMES = (LOW_RANK, DORA, IA3_OUT, IN_VECTOR, BIAS, SPARSE_DELTA, FLORA)
"""What `random_adapter` knows; DORA is c from magnitudes, IA3_OUT is c that scales the base's bias, OUT_VECTOR neither."""


def in_dtype(values: Matrix, dtype: str) -> NDArray[np.float64]:
    """Return values as an image of a compute dtype holds them."""
    narrow = values.astype(np.float32)
    return (from_bfloat16(to_bfloat16(narrow)) if dtype == "bfloat16" else narrow).astype(np.float64)


def dense_of(arrays: Arrays, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return a sparse delta as a matrix ``[out, in]``."""
    values, columns, starts = arrays
    dense = np.zeros(shape)
    for row in range(shape[0]):
        dense[row, columns[starts[row] : starts[row + 1]]] = values[starts[row] : starts[row + 1]]
    return dense


def module_output(
    parts: Sequence[Part],
    tensors: Mapping[str, Arrays],
    weight: Matrix,
    bias: Matrix | None,
    x: Matrix,
    *,
    scale: float = 1.0,
    dtype: str = "float32",
) -> NDArray[np.float64]:
    """Return what a projection computes for rows ``x [tokens, in]`` of one adapter, fp64 ``[tokens, out]``.

    Args:
        parts: The module's parts.
        tensors: By kind, the tensors of a part.
        weight: The base's ``[out, in]``.
        bias: The base's ``[out]``.
        x: Rows.
        scale: The requests' own factor.
        dtype: Compute dtype of the image, which pairs and sparse values are rounded to.
    """
    by_kind = {part.kind: part for part in parts}
    wide, x = weight.astype(np.float64), x.astype(np.float64)
    base = np.zeros(len(wide)) if bias is None else bias.astype(np.float64)
    factor = tensors[IN_VECTOR][0].astype(np.float64) if IN_VECTOR in by_kind else 1.0
    replaced = wide
    if FLORA in by_kind:
        a, b = tensors[FLORA]
        replaced = wide * (b.astype(np.float64) @ a.astype(np.float64))
    delta = np.zeros_like(wide)
    if isinstance(pair := by_kind.get(LOW_RANK), LowRank):
        a, b = (in_dtype(each, dtype) for each in tensors[LOW_RANK])
        delta = pair.scaling * (b @ a)
    y = (x * factor) @ replaced.T + scale * (x @ delta.T)
    if isinstance(vector := by_kind.get(OUT_VECTOR), OutVector):
        c = tensors[OUT_VECTOR][0].astype(np.float64)
        if vector.is_magnitude:
            c = c / np.linalg.norm(wide + delta, axis=1)
        y = (y + base) * c if vector.scales_bias else y * c + base
    else:
        y = y + base
    if isinstance(sparse := by_kind.get(SPARSE_DELTA), SparseDelta):
        values, columns, starts = tensors[SPARSE_DELTA]
        dense = dense_of((in_dtype(values, dtype), columns, starts), weight.shape)
        y = y + scale * sparse.scaling * (x @ dense.T)
    if BIAS in by_kind:
        y = y + scale * tensors[BIAS][0].astype(np.float64)
    return y


def random_part(name: str, shape: tuple[int, int], rng: np.random.Generator, weight: Matrix) -> tuple[Part, Arrays]:
    """Return a part of one of `PART_NAMES`, or a plain c, for a projection ``(in, out)`` with the base's weight."""
    inputs, outputs = shape

    def normal(*size: int) -> NDArray[np.float32]:
        return rng.standard_normal(size, dtype=np.float32)

    if name == LOW_RANK:
        rank = int(rng.integers(1, 20))
        return LowRank(rank, float(rng.uniform(0.25, 2))), (
            normal(rank, inputs) / np.float32(np.sqrt(inputs)),
            normal(outputs, rank) / np.float32(np.sqrt(rank)),
        )
    if name == DORA:
        near = np.linalg.norm(weight, axis=1) * rng.uniform(0.5, 1.5, outputs) * rng.choice([-1, 1], outputs)
        return OutVector(is_magnitude=True), (near.astype(np.float32),)
    if name == IN_VECTOR:
        return InVector(), (1 + normal(inputs) / 2,)
    if name == BIAS:
        return Bias(), (normal(outputs),)
    if name == SPARSE_DELTA:
        flat = np.sort(rng.choice(inputs * outputs, int(rng.integers(1, inputs * outputs // 8)), replace=False))
        starts = np.searchsorted(flat // inputs, np.arange(outputs + 1)).astype(np.int32)
        return SparseDelta(len(flat), float(rng.uniform(0.5, 2))), (
            normal(len(flat)) / np.float32(np.sqrt(inputs)),
            (flat % inputs).astype(np.int32),
            starts,
        )
    if name == FLORA:
        rank = int(rng.integers(1, 9))
        return Flora(rank), (normal(rank, inputs), normal(outputs, rank) / np.float32(np.sqrt(rank)))
    return OutVector(scales_bias=name == IA3_OUT), (1 + normal(outputs) / 2,)


def random_adapter(
    geometry: Geometry,
    wanted: Mapping[tuple[int, str], Sequence[str]],
    weights: Mapping[tuple[int, str], Matrix],
    seed: int,
) -> tuple[AdapterSpec, Tensors]:
    """Return a random adapter.

    Args:
        geometry: The model's.
        wanted: By layer and projection, the parts by the names of `random_part`; slices of one op share their e.
        weights: The base's, by layer and projection.
        seed: Seed of its values.
    """
    rng = np.random.default_rng(seed)
    modules, tensors, shared = [], {}, dict[tuple[int, int], "Arrays"]()
    for (layer, projection), names in sorted(wanted.items()):
        parts = []
        for name in names:
            shape = geometry.projection(layer, projection).shape
            part, arrays = random_part(name, shape, rng, weights[layer, projection])
            if name == IN_VECTOR:
                arrays = shared.setdefault((layer, geometry.place(layer, projection)[0]), arrays)
            parts.append(part)
            tensors[layer, projection, part.kind] = arrays
        modules.append(ModuleSpec(layer, projection, tuple(parts)))
    return AdapterSpec(f"{seed:064x}", tuple(modules)), tensors
