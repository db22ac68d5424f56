"""One adapter of each kind for a model: its spec and an image of random values, shared by all adapters of that kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, pack
from loraplex_common.flora import Flora
from loraplex_common.low_rank import LowRank
from loraplex_common.sparse_delta import SparseDelta
from loraplex_common.vectors import InVector, OutVector
from numpy.typing import NDArray

from loraplex_bench.rig import VALUE_STD

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.part_kind import Arrays, Part
    from loraplex_common.projections import Projection

LORA: Final = "LoRA r16"
DORA: Final = "DoRA r16"
SHIRA: Final = "SHiRA 1 %"
IA3: Final = "(IA)3"
FLORA: Final = "FLoRA r2"
FLORA_RANK: Final = 2
RANK: Final = 16
DENSITY: Final = 0.01
IA3_OUTPUTS: Final = ("k_proj", "v_proj")
IA3_INPUTS: Final = ("down_proj",)


@dataclass(frozen=True)
class KindImage:
    """The adapters of one kind.

    Attributes:
        modules: Their modules.
        image: uint8 ``[pages, page_bytes]``.
        num_nonzeros: Non-zeros of their sparse deltas, all layers.
    """

    modules: tuple[ModuleSpec, ...]
    image: NDArray[np.uint8]
    num_nonzeros: int = 0

    def spec(self, number: int) -> AdapterSpec:
        """Return the spec of one of them."""
        return AdapterSpec(f"{number:064x}", self.modules)


def kind_images(geometry: Geometry) -> dict[str, KindImage]:
    """Return every kind's image."""
    return {name: _image(geometry, name) for name in (LORA, DORA, SHIRA, IA3, FLORA)}


def _image(geometry: Geometry, name: str) -> KindImage:
    rng, modules = np.random.default_rng(0), []
    tensors: dict[tuple[int, str, str], Arrays] = {}
    drawn: dict[str, list[tuple[Part, Arrays]]] = {}  # every layer has the same values: drawing is most of the work
    for layer in range(geometry.num_layers):
        for projection in geometry.layers[layer]:
            if projection.path not in drawn:
                drawn[projection.path] = _parts(name, projection, rng)
            parts = drawn[projection.path]
            if parts:
                modules.append(ModuleSpec(layer, projection.name, tuple(part for part, _ in parts)))
                tensors |= {(layer, projection.name, part.kind): arrays for part, arrays in parts}
    spec = AdapterSpec("0" * 64, tuple(modules))
    nonzeros = sum(part.num_nonzeros for each in modules for part in each.parts if isinstance(part, SparseDelta))
    return KindImage(tuple(modules), pack(geometry, spec, tensors), nonzeros)


def _parts(name: str, projection: Projection, rng: np.random.Generator) -> list[tuple[Part, Arrays]]:
    columns, outputs = projection.in_features, projection.out_features

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(VALUE_STD)

    if name == SHIRA:
        arrays = _csr(columns, outputs, rng)
        return [(SparseDelta(len(arrays[0])), arrays)]
    if name == IA3:
        near_one = (1 + normal(outputs),)
        if projection.name in IA3_OUTPUTS:
            return [(OutVector(scales_bias=True), near_one)]
        return [(InVector(), (1 + normal(columns),))] if projection.name in IA3_INPUTS else []
    if name == FLORA:
        return [(Flora(FLORA_RANK), (1 + normal(FLORA_RANK, columns), (1 + normal(outputs, FLORA_RANK)) / FLORA_RANK))]
    pair: tuple[Part, Arrays] = (LowRank(RANK, 2.0), (normal(RANK, columns), normal(outputs, RANK)))
    return [pair, (OutVector(is_magnitude=True), (1 + normal(outputs),))] if name == DORA else [pair]


def _csr(columns: int, outputs: int, rng: np.random.Generator) -> Arrays:
    """Return a random mask's values, columns and starts: each output's number of non-zeros is binomial."""
    counts = np.maximum(rng.binomial(columns, DENSITY, outputs), 1)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    where = (within + rng.random(starts[-1])) / np.repeat(counts, counts) * columns
    values = rng.standard_normal(starts[-1], dtype=np.float32) * np.float32(VALUE_STD)
    return values, np.minimum(where, columns - 1).astype(np.int32), starts
