"""How much each part of an adapter changes: norms, largest values, distances from 1. Sums are fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec
from loraplex_common.flora import FLORA
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.token_rows import ROWS
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, OutVector

from loraplex_adapter_store.checkpoint.canonical import read_canonical, read_text_parts

if TYPE_CHECKING:
    from loraplex_common.part_kind import Arrays, Part
    from numpy.typing import NDArray

_SLICE_ITEMS: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PartMeasure:
    """One part; see the contract's ``AdapterReport.Part``.

    Attributes:
        norm: Frobenius norm of what it adds, the scale included; None for factors.
        largest: Largest magnitude among its values, the scale left out.
        deviation: Largest distance of a factor from 1; None for what adds, and for magnitudes.
    """

    kind: str
    size: int
    scale: float | None
    norm: float | None
    largest: float
    deviation: float | None
    is_magnitude: bool = False

    @property
    def has_relative_norm(self) -> bool:
        """Whether its norm can be compared with that of the base's weight."""
        return self.kind in (LOW_RANK, SPARSE_DELTA)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleMeasure:
    """One adapted projection."""

    layer: int
    projection: str
    parts: tuple[PartMeasure, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterMeasure:
    """One revision, as its canonical form has it."""

    spec: AdapterSpec
    base_fingerprint: str
    modules: tuple[ModuleMeasure, ...]
    invocation_token_ids: tuple[int, ...]


def measure(data: bytes | bytearray, revision: str) -> AdapterMeasure:
    """Measure a canonical form; takes seconds for gigabytes, so it is for a thread.

    Raises:
        AdapterCorruptError: If the bytes are not those of the revision.
        TypeError: If it has a text part that this version does not know.
    """
    adapter = read_canonical(data, revision)
    modules = tuple(
        ModuleMeasure(
            layer=module.layer,
            projection=module.projection,
            parts=tuple(
                measure_part(part, adapter.tensors[module.layer, module.projection, part.kind]) for part in module.parts
            ),
        )
        for module in adapter.spec.modules
    )
    invocation = read_text_parts(data).invocation_token_ids
    return AdapterMeasure(
        spec=adapter.spec,
        base_fingerprint=adapter.base_fingerprint,
        modules=modules,
        invocation_token_ids=invocation,
    )


def measure_part(part: Part, arrays: Arrays) -> PartMeasure:
    """Measure one part from its tensors, in the order of `PartKind.shapes`."""
    scale = float(getattr(part, "scaling", 1.0)) if part.kind in (LOW_RANK, SPARSE_DELTA) else None
    is_magnitude = isinstance(part, OutVector) and part.is_magnitude
    norm: float | None = None
    deviation: float | None = None
    if part.kind == LOW_RANK:
        a, b = arrays
        norm = pair_norm(a, b, scale or 0.0)
    elif part.kind in (SPARSE_DELTA, BIAS):
        norm = abs(1.0 if scale is None else scale) * math.sqrt(float(np.square(arrays[0], dtype=np.float64).sum()))
    elif part.kind in (OUT_VECTOR, IN_VECTOR) and not is_magnitude:
        deviation = float(np.abs(arrays[0] - 1.0).max())
    elif part.kind == FLORA:
        deviation = _product_deviation(*arrays)
    values = {SPARSE_DELTA: arrays[:1], ROWS: arrays[1:]}.get(part.kind, arrays)
    return PartMeasure(
        kind=part.kind,
        size=part.size,
        scale=scale,
        norm=norm,
        largest=max((_largest(each) for each in values if each.size), default=0.0),
        deviation=deviation,
        is_magnitude=is_magnitude,
    )


def _largest(values: NDArray[Any]) -> float:
    """Return the largest magnitude, without a copy: rows of tokens may be gigabytes."""
    return max(float(values.max()), -float(values.min()))


def pair_norm(a: NDArray[Any], b: NDArray[Any], scaling: float) -> float:
    """Return ``||scaling B A||`` (Frobenius) as ``|scaling| sqrt(tr((B^T B)(A A^T)))``, without the product B A.

    Args:
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``.
        scaling: Factor on the product.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    return abs(scaling) * math.sqrt(max(0.0, square))  # rounding may leave a little less than 0


def _product_deviation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the largest ``|B A - 1|``, a slice of outputs at a time."""
    step = max(1, _SLICE_ITEMS // a.shape[1])
    return max(float(np.abs(b[first : first + step] @ a - 1.0).max()) for first in range(0, len(b), step))
