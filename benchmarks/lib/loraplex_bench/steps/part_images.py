"""One adapter of each kind for a model: its spec and an image of random values, shared by all adapters of that kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, pack
from loraplex_common.flora import Flora
from loraplex_common.low_rank import LowRank
from loraplex_common.sparse_delta import SparseDelta
from loraplex_common.token_rows import Rows
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
HEAD: Final = "LoRA r16, lm_head r16 and 64 rows"
NUM_TOKEN_ROWS: Final = 64
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
        head_bytes: Bytes of what they do to lm_head.
    """

    modules: tuple[ModuleSpec, ...]
    image: NDArray[np.uint8]
    num_nonzeros: int = 0
    head_bytes: int = 0

    def spec(self, number: int) -> AdapterSpec:
        """Return the spec of one of them."""
        return AdapterSpec(f"{number:064x}", self.modules)


def kind_images(geometry: Geometry) -> dict[str, KindImage]:
    """Return every kind's image."""
    return {name: _image(geometry, name) for name in (LORA, DORA, SHIRA, IA3, FLORA, HEAD)}


def _image(geometry: Geometry, name: str) -> KindImage:
    rng, modules = np.random.default_rng(0), []
    tensors: dict[tuple[int, str, str], Arrays] = {}
    drawn: dict[str, list[tuple[Part, Arrays]]] = {}  # every layer has the same values: drawing is most of the work
    for layer in range(geometry.num_decoder_layers):
        for projection in geometry.layers[layer]:
            if projection.path not in drawn:
                drawn[projection.path] = _parts(name, projection, rng)
            parts = drawn[projection.path]
            if parts:
                modules.append(ModuleSpec(layer, projection.name, tuple(part for part, _ in parts)))
                tensors |= {(layer, projection.name, part.kind): arrays for part, arrays in parts}
    head_bytes = _add_outside(geometry, rng, modules, tensors) if name == HEAD else 0
    spec = AdapterSpec("0" * 64, tuple(modules))
    nonzeros = sum(part.num_nonzeros for each in modules for part in each.parts if isinstance(part, SparseDelta))
    return KindImage(tuple(modules), pack(geometry, spec, tensors), nonzeros, head_bytes)


def _add_outside(
    geometry: Geometry,
    rng: np.random.Generator,
    modules: list[ModuleSpec],
    tensors: dict[tuple[int, str, str], Arrays],
) -> int:
    """Add a pair on lm_head and rows of the same tokens on both ends; return the bytes of what lm_head's kernels read."""
    outside = geometry.outside
    assert outside is not None, "the model offers its embedding and lm_head"
    head = geometry.projection(outside, "lm_head")
    hidden, vocab = head.shape
    ids = np.linspace(0, vocab - 1, NUM_TOKEN_ROWS).astype(np.int32)
    rows = Rows(NUM_TOKEN_ROWS, int(ids[-1]))
    for name, parts in (("embed_tokens", [rows]), ("lm_head", [*(part for part, _ in _parts(HEAD, head, rng)), rows])):
        modules.append(ModuleSpec(outside, name, tuple(parts)))
        values = rng.standard_normal((NUM_TOKEN_ROWS, hidden), dtype=np.float32) * np.float32(VALUE_STD)
        tensors[outside, name, rows.kind] = ids, values
    tensors |= {(outside, "lm_head", part.kind): arrays for part, arrays in _parts(HEAD, head, rng)}
    return 2 * (RANK * (hidden + vocab) + NUM_TOKEN_ROWS * hidden)


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
