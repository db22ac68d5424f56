"""What an adapter's parts do together: inputs that projections share, and effects that no training can have meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.flora import FLORA
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.projections import ops_of
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, OutVector

from loraplex_adapter_store.checkpoint.naming import counted_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.parts import Module, PartTensors


def check_shared_inputs(modules: Sequence[Module], base: BaseModelInfo) -> None:
    """Refuse factors on inputs that differ between projections which one fused product computes from one input.

    Raises:
        AdapterIncompatibleError: If there are some; the message names the projections.
    """
    scaled = {
        (module.layer, module.projection): part.tensors[0]
        for module in modules
        if (part := module.of_kind(IN_VECTOR)) is not None
    }
    for layer in sorted({layer for layer, _ in scaled}):
        for op in ops_of(base.layers[layer]):
            vectors = [scaled.get((layer, name)) for name in op.slices]
            first = next((each for each in vectors if each is not None), None)
            if first is None:
                continue
            for name, other in zip(op.slices, vectors, strict=True):
                if other is None or not np.array_equal(first.values(), other.values()):
                    raise AdapterIncompatibleError(
                        f"layer {layer}: {', '.join(op.slices)} are computed from one input, and {name} does not scale it as "
                        f"tensor {first.name} does; train (IA)3 with feedforward_modules that have an input of their own, "
                        "such as down_proj"
                    )


def warnings_of(modules: Sequence[Module]) -> Iterator[str]:
    """Yield what is odd about an adapter although it can be served."""
    idle = [module.name for module in modules if all(map(_is_nothing, module.parts))]
    if 0 < len(idle) < len(modules):
        yield (
            f"the delta is zero in {counted_names(idle)}, of {len(modules)} in all: they answer as the base model does. Were "
            "they trained, and gathered before they were saved?"
        )
    if len(idle) == len(modules):
        kinds = {part.kind for module in modules for part in module.parts}
        what = "A or B is zero in every module" if kinds == {LOW_RANK} else "no module changes anything"
        yield (
            f"{what}: the adapter answers as the base model does. Is it saved before training, or "
            "without its trained values (FSDP, DeepSpeed: gather first)?"
        )
    for module in modules:
        for part in module.parts:
            if part.kind in (OUT_VECTOR, IN_VECTOR, FLORA) and any(each.largest() == 0 for each in part.tensors):
                yield (
                    f"{module.name}: all its factors are 0 ({part.tensors[0].name}), so it forgets its input. Is the "
                    "adapter saved without its trained values?"
                )


def _is_nothing(part: PartTensors) -> bool:
    """Return whether a part certainly leaves the base as it is; of magnitudes only an engine can tell."""
    if part.kind in (LOW_RANK, BIAS):
        return any(each.largest() == 0 for each in part.tensors)
    if part.kind == SPARSE_DELTA:
        return part.tensors[0].largest() == 0
    if isinstance(part.part, OutVector) and part.part.is_magnitude:
        return False
    return part.kind in (OUT_VECTOR, IN_VECTOR) and bool((part.tensors[0].values() == 1).all())
