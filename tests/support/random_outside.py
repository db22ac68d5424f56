"""Random adapters of the embedding and of lm_head: pairs, rows that they replace, tokens that they add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.part_kind import Part
from loraplex_common.token_rows import ROWS, Rows, row_width

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.part_kind import Arrays

EMBED: Final = "embed_tokens"
HEAD: Final = "lm_head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outside:
    """What an adapter does.

    Attributes:
        embed: Rank on the embedding, and the tokens whose rows it replaces, rising; ``head`` likewise.
        inner_rank: Rank on q_proj of every layer.
        strength: Size of its pairs' deltas and of its rows.
    """

    embed: tuple[int, Sequence[int]] = (0, ())
    head: tuple[int, Sequence[int]] = (0, ())
    inner_rank: int = 0
    strength: float = 1.0


def draw_outside(
    geometry: Geometry, wanted: Outside, number: int, dtype: str | None = None
) -> tuple[AdapterSpec, Tensors]:
    """Return a random adapter.

    Args:
        geometry: The model's.
        wanted: What it does.
        number: Seed, and digest.
        dtype: Values are rounded to it; the geometry's if unset.
    """
    assert geometry.outside is not None
    rng, modules, tensors = np.random.default_rng(number), [], dict[tuple[int, str, str], Any]()
    inner = [(layer, "q_proj", wanted.inner_rank, ()) for layer in range(geometry.outside)]
    for layer, name, rank, ids in [
        *inner,
        (geometry.outside, EMBED, *wanted.embed),
        (geometry.outside, HEAD, *wanted.head),
    ]:
        projection, parts = geometry.projection(layer, name), list[Part]()

        def rounded(*shape: int, size: float) -> np.ndarray[Any, np.dtype[np.float32]]:
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(size)
            return values if (dtype or geometry.dtype) == "float32" else from_bfloat16(to_bfloat16(values))

        if rank:
            parts.append(LowRank(rank, float(0.5 + rng.random())))
            columns, outputs = projection.shape
            size = 1.0 if name == EMBED else columns**-0.5
            pair: Arrays = rounded(rank, columns, size=size), rounded(outputs, rank, size=wanted.strength / rank**0.5)
            tensors[layer, name, LOW_RANK] = pair
        if len(ids):
            parts.append(Rows(len(ids), ids[-1]))
            size = wanted.strength if name == EMBED else wanted.strength * row_width(projection) ** -0.5
            values = rounded(len(ids), row_width(projection), size=size)
            tensors[layer, name, ROWS] = np.array(ids, dtype=np.int32), values
        if parts:
            modules.append(ModuleSpec(layer, name, tuple(parts)))
    return AdapterSpec(f"{number:064x}", tuple(modules)), tensors
