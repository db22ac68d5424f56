"""What a request and its adapters must agree on; known of each adapter once its image has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError
from loraplex_common.flora import FLORA
from loraplex_common.vectors import IN_VECTOR, OUT_VECTOR

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_common.adapter_parts import PartSize
    from loraplex_common.errors import LoraplexError

    from loraplex_engine.messages import Submission


_MULTIPLIERS: Final = {
    OUT_VECTOR: "a factor on its outputs (DoRA, (IA)3)",
    IN_VECTOR: "a factor on its inputs ((IA)3)",
    FLORA: "FLoRA",
}


def disagreement(submission: Submission, spec: AdapterSpec) -> LoraplexError | None:
    """Return why a request cannot be computed with an adapter of its own; None if it can."""
    for field, token_id in submission.added_token_ids:
        if token_id > spec.last_row_id:
            return InvalidParameterError(_no_row(field, token_id, spec), field=field)
    if submission.more_adapters:
        return _why_not_added(spec)
    if spec.is_activated and submission.adapter_start is None:
        return AdapterIncompatibleError(
            f"adapter {spec.digest} is activated by a sequence of tokens, and the gateway did not say where the prompt has it: "
            "update the gateway"
        )
    if not spec.is_activated and submission.adapter_start is not None:
        return InvalidParameterError(
            f"adapter_start: adapter {spec.digest} applies to whole sequences; leave it unset", field="adapter_start"
        )
    part, scale = spec.unscalable, submission.adapter_scale
    if part is None or scale == 1:
        return None
    return InvalidParameterError(
        f"adapter_scale: {scale:g} cannot be applied to adapter {spec.digest}: {_what(part)}; leave "
        "adapter_scale out, or name an adapter of pairs, biases and sparse deltas alone",
        field="adapter_scale",
    )


def _no_row(field: str, token_id: int, spec: AdapterSpec) -> str:
    last = spec.last_row_id
    what = f"its rows of tokens end at {last}" if last >= 0 else "it adds no tokens"
    return (
        f"{field}: token id {token_id} is behind the base model's vocabulary, and adapter {spec.digest} has no row for it: "
        f"{what}; use ids of the vocabulary, or name the adapter that adds the token"
    )


def _why_not_added(spec: AdapterSpec) -> LoraplexError | None:
    """Return why an adapter cannot be one of several of a request; None if it can."""
    part = spec.unscalable
    if spec.is_activated:
        why = "it is activated by a sequence of tokens, from which on it alone applies"
    elif part is not None:
        why = _what(part)
    else:
        return None
    return InvalidParameterError(
        f"adapters: adapter {spec.digest} cannot be added to others: {why}; name it alone, or name adapters of pairs, biases and "
        "sparse deltas",
        field="adapters",
    )


def _what(part: PartSize) -> str:
    multiplier = _MULTIPLIERS.get(part.kind)
    if multiplier is None:  # such parts are outside of the layers
        return f"{part.projection} has rows of tokens, which replace what the base model has"
    return f"in layer {part.layer}, {part.projection} has {multiplier}, which multiplies what the base model computes"
