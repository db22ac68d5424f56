"""Checks what a request wants its output to be: a structure, and sequences that it must not contain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_engine.rpc.validation import require

if TYPE_CHECKING:
    from loraplex.v1 import engine_pb2, gateway_pb2

    from loraplex_engine.rpc.validation import RequestLimits

MAX_BAD_SEQUENCES: Final = 256
MAX_SEQUENCE_TOKENS: Final = 512
"""Tokens of a bad sequence, and of the sequence that a structure starts after."""
MAX_CHOICES: Final = 1024
FIELD: Final = "structured_output"


def check_structured_output(submit: engine_pb2.Submit, limits: RequestLimits) -> StructuredOutput | None:
    """Return the structure that the request wants; None if it wants none.

    Raises:
        InvalidParameterError: If not exactly one constraint is set, or a value is out of its range.
    """
    if not submit.HasField("structured_output"):
        return None
    wire = submit.structured_output
    name = wire.WhichOneof("constraint")
    require(name is not None, FIELD, f"one of {', '.join(kind.value for kind in ConstraintKind)} must be set")
    starts_after = f"{FIELD}.starts_after"
    num_tokens = len(wire.starts_after)
    require(num_tokens <= MAX_SEQUENCE_TOKENS, starts_after, f"{num_tokens} tokens exceed {MAX_SEQUENCE_TOKENS}")
    limits.check_ids(wire.starts_after, starts_after, submit)
    return StructuredOutput(
        kind=ConstraintKind(name), text=_text(wire, str(name)), starts_after=tuple(wire.starts_after)
    )


def check_bad_sequences(submit: engine_pb2.Submit, limits: RequestLimits) -> tuple[tuple[int, ...], ...]:
    """Return the sequences that the output must not contain.

    Raises:
        InvalidParameterError: If one is empty or too long, there are too many, or an id does not exist.
    """
    field, count = "bad_token_sequences", len(submit.bad_token_sequences)
    require(count <= MAX_BAD_SEQUENCES, field, f"{count} sequences exceed {MAX_BAD_SEQUENCES}")
    for index, sequence in enumerate(submit.bad_token_sequences):
        name, length = f"{field}[{index}]", len(sequence.ids)
        require(1 <= length <= MAX_SEQUENCE_TOKENS, name, f"{length} tokens are not in [1, {MAX_SEQUENCE_TOKENS}]")
        limits.check_ids(sequence.ids, f"{name}.ids", submit)
    return tuple(tuple(sequence.ids) for sequence in submit.bad_token_sequences)


def _text(wire: gateway_pb2.StructuredOutput, name: str) -> str:
    if name == "json_object":
        require(wire.json_object, f"{FIELD}.{name}", "must be true; leave structured_output out for any text")
        return ""
    if name == "choice":
        choices = list(wire.choice.choices)
        require(
            1 <= len(choices) <= MAX_CHOICES, f"{FIELD}.{name}", f"{len(choices)} choices are not in [1, {MAX_CHOICES}]"
        )
        return json.dumps(choices, ensure_ascii=False)
    text: str = getattr(wire, name)
    require(bool(text), f"{FIELD}.{name}", "is empty")
    return text
