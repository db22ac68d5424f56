"""FLoRA of rank 1 is a factor on outputs and one on inputs, which cost no pass over the base's weights.

``(W o b a^T) x = b * (W (a * x))``. Projections that one fused product computes from one input have to share their factor on
inputs, so those of an op are taken only where all of them have rank 1 and one a; o and down have an input of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.flora import FLORA
from loraplex_common.projections import ops_of
from loraplex_common.vectors import InVector, OutVector

from loraplex_adapter_store.checkpoint.parts import Module, PartTensors
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.base_model import BaseModelInfo


def fold_rank_one(modules: Sequence[Module], base: BaseModelInfo) -> list[Module]:
    """Return the modules in their order, FLoRA of rank 1 as factors wherever that computes the same."""
    at = {(module.layer, module.projection): module for module in modules if module.of_kind(FLORA) is not None}
    folded: set[tuple[int, str]] = set()
    for layer in sorted({layer for layer, _ in at}):
        for op in ops_of(base.layers[layer]):
            places = [(layer, name) for name in op.slices]
            if _share_one_input_factor([at.get(place) for place in places]):
                folded.update(places)
    return [_folded(module) if (module.layer, module.projection) in folded else module for module in modules]


def _share_one_input_factor(modules: Sequence[Module | None]) -> bool:
    floras = [None if module is None else module.of_kind(FLORA) for module in modules]
    if any(flora is None or flora.part.size != 1 for flora in floras):
        return False
    first, *others = (flora.tensors[0].values() for flora in floras if flora is not None)
    return all(np.array_equal(first, other) for other in others)


def _folded(module: Module) -> Module:
    parts: list[PartTensors] = []
    for part in module.parts:
        if part.kind != FLORA:
            parts.append(part)
            continue
        a, b = part.tensors
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        parts += [
            PartTensors(OutVector(), (b.reshaped(b.shape[0]),)),
            PartTensors(InVector(), (a.reshaped(a.shape[1]),)),
        ]
    return Module(module.layer, module.projection, module.name, tuple(parts))
