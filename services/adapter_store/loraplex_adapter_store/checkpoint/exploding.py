"""Finds deltas that are so large that the base model's own output would drown in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_common.low_rank import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA

from loraplex_adapter_store.checkpoint.naming import counted_names
from loraplex_adapter_store.measures import measure_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loraplex_adapter_store.checkpoint.parts import Module, PartTensors

MAX_RELATIVE_NORM: Final = 10.0
"""Norm of a delta relative to that of the base's weight; trained ones are below 1, most below 0.1."""
MAX_GAIN: Final = 1000.0
"""Where the weight's norm is not known: a delta's norm divided by the root of its outputs, so the root mean square of what it
makes of inputs of unit variance. A base's weight has about 1."""


def exploding_of(modules: Sequence[Module], norms: Mapping[tuple[int, str], float]) -> Iterator[str]:
    """Yield a warning that names the modules whose delta is exploding, if there are any.

    Args:
        modules: The adapter.
        norms: (layer, projection) -> Frobenius norm of the base's weight; empty if it is not known.
    """
    by_norm: list[str] = []
    by_gain: list[str] = []
    for module in modules:
        base_norm = norms.get((module.layer, module.projection), 0.0)
        for part in module.parts:
            if part.kind not in (LOW_RANK, SPARSE_DELTA):
                continue
            outputs = _num_outputs(part)
            limit = MAX_RELATIVE_NORM * base_norm if base_norm else MAX_GAIN * math.sqrt(outputs)
            if _bound(part) > limit and _norm(part) > limit:
                (by_norm if base_norm else by_gain).append(module.name)
    if by_norm:
        yield (
            f"the delta is more than {MAX_RELATIVE_NORM:g} times as large as the base's weight in {counted_names(by_norm)}: "
            "the adapter drowns its base. Has its training diverged, or is lora_alpha wrong?"
        )
    if by_gain:
        yield (
            f"the delta makes of inputs of unit size outputs of more than {MAX_GAIN:g} in {counted_names(by_gain)}: the adapter "
            "drowns its base. Has its training diverged, or is lora_alpha wrong?"
        )


def _num_outputs(part: PartTensors) -> int:
    return part.tensors[1].shape[0] if part.kind == LOW_RANK else part.tensors[2].shape[0] - 1


def _bound(part: PartTensors) -> float:
    """Return an upper bound of a part's norm from its largest values, which are known."""
    scale = abs(float(getattr(part.part, "scaling", 1.0)))
    factors = part.tensors if part.kind == LOW_RANK else part.tensors[:1]
    return scale * math.prod(each.largest() * math.sqrt(math.prod(each.shape)) for each in factors)


def _norm(part: PartTensors) -> float:
    return measure_part(part.part, tuple(each.values() for each in part.tensors)).norm or 0.0
