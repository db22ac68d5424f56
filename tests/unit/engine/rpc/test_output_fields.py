"""What a request wants its output to be, read from the wire: each field has a range, and a violation names the field."""

from __future__ import annotations

import pytest
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.output_fields import MAX_BAD_SEQUENCES, MAX_CHOICES, MAX_SEQUENCE_TOKENS
from loraplex_engine.rpc.validation import RequestLimits

LIMITS = RequestLimits(vocab_size=100, max_model_len=32)
Wire = gateway_pb2.StructuredOutput


def read(**fields: object) -> tuple[StructuredOutput | None, tuple[tuple[int, ...], ...]]:
    submit = engine_pb2.Submit(
        request_id="r",
        prompt_token_ids=[1],
        sampling=gateway_pb2.SamplingParams(temperature=0.0),
        **fields,  # type: ignore[arg-type]
    )
    submission = wire.submission(submit, session_id=1, limits=LIMITS, now_s=1.0)
    assert submission.rules is None
    return submission.structured_output, submission.bad_token_sequences


def ids(*token_ids: int) -> gateway_pb2.TokenIds:
    return gateway_pb2.TokenIds(ids=token_ids)


def choices(*texts: str) -> gateway_pb2.StructuredOutput.Choices:
    return Wire.Choices(choices=texts)


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        (Wire(json_object=True), ConstraintKind.JSON_OBJECT, ""),
        (Wire(json_schema="{}"), ConstraintKind.JSON_SCHEMA, "{}"),
        (Wire(regex="a+"), ConstraintKind.REGEX, "a+"),
        (Wire(grammar='start: "a"'), ConstraintKind.GRAMMAR, 'start: "a"'),
        (Wire(structural_tag="[]"), ConstraintKind.STRUCTURAL_TAG, "[]"),
        (Wire(choice=choices("ja", "né\n")), ConstraintKind.CHOICE, '["ja", "né\\n"]'),
    ],
)
def test_every_kind_arrives_with_what_it_starts_after(message: Wire, kind: ConstraintKind, text: str) -> None:
    message.starts_after.extend([4, 5])

    assert read(structured_output=message)[0] == StructuredOutput(kind=kind, text=text, starts_after=(4, 5))


def test_bad_sequences_arrive() -> None:
    assert read(bad_token_sequences=[ids(1), ids(2, 3)]) == (None, ((1,), (2, 3)))


def test_a_request_without_either_has_neither() -> None:
    assert read() == (None, ())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"structured_output": Wire()}, "structured_output"),
        ({"structured_output": Wire(json_object=False)}, "structured_output.json_object"),
        ({"structured_output": Wire(regex="")}, "structured_output.regex"),
        ({"structured_output": Wire(json_schema="")}, "structured_output.json_schema"),
        ({"structured_output": Wire(choice=choices())}, "structured_output.choice"),
        ({"structured_output": Wire(choice=choices(*"x" * (MAX_CHOICES + 1)))}, "structured_output.choice"),
        ({"structured_output": Wire(regex="a", starts_after=[100])}, "structured_output.starts_after[0]"),
        (
            {"structured_output": Wire(regex="a", starts_after=[1] * (MAX_SEQUENCE_TOKENS + 1))},
            "structured_output.starts_after",
        ),
        ({"bad_token_sequences": [ids(1), ids()]}, "bad_token_sequences[1]"),
        ({"bad_token_sequences": [ids(*[1] * (MAX_SEQUENCE_TOKENS + 1))]}, "bad_token_sequences[0]"),
        ({"bad_token_sequences": [ids(1), ids(2, 100)]}, "bad_token_sequences[1].ids[1]"),
        ({"bad_token_sequences": [ids(1)] * (MAX_BAD_SEQUENCES + 1)}, "bad_token_sequences"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        read(**fields)

    assert refusal.value.field == field
    assert field in refusal.value.message
