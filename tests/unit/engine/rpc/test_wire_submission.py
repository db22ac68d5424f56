from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.errors import DeadlineError, InvalidParameterError, NotSupportedError
from loraplex_engine.messages import AdapterTerm, Priority, Submission
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.validation import RequestLimits
from loraplex_engine.sampling_params import AddedTokenId, SamplingParams, StoppingParams

LIMITS = RequestLimits(vocab_size=100, max_model_len=32)
DIGEST, OTHER = "ab" * 32, "cd" * 32


def make_submit(**fields: object) -> engine_pb2.Submit:
    defaults: dict[str, object] = {
        "request_id": "r-1",
        "slot": 3,
        "prompt_token_ids": [1, 2, 3],
        "sampling": gateway_pb2.SamplingParams(temperature=0.0, seed=7),
    }
    return engine_pb2.Submit(**(defaults | fields))  # type: ignore[arg-type]


def more(*terms: tuple[str, float | None]) -> list[engine_pb2.AdapterTerm]:
    return [engine_pb2.AdapterTerm(digest=digest, scale=scale) for digest, scale in terms]


def submission(submit: engine_pb2.Submit) -> Submission:
    return wire.submission(submit, session_id=9, limits=LIMITS, now_s=1000.0)


def sampling(**fields: object) -> gateway_pb2.SamplingParams:
    return gateway_pb2.SamplingParams(**({"seed": 1} | fields))  # type: ignore[arg-type]


def stopping(**fields: object) -> gateway_pb2.StoppingParams:
    return gateway_pb2.StoppingParams(**fields)  # type: ignore[arg-type]


def test_unset_fields_take_their_stated_defaults() -> None:
    result = submission(make_submit(sampling=gateway_pb2.SamplingParams(seed=5)))

    assert result.sampling == SamplingParams(temperature=1.0, seed=5)
    assert result.stopping == StoppingParams()
    assert (result.adapter_digest, result.adapter_scale, result.priority) == (None, 1.0, Priority.NORMAL)
    assert (result.more_adapters, result.adapters) == ((), ())
    assert (result.deadline_s, result.queue_deadline_s, result.time_limit_at_s) == (None, None, None)


def test_every_field_arrives() -> None:
    message = make_submit(
        resumed_token_ids=[4, 5],
        sampling=sampling(
            **{"temperature": 0.5, "top_k": 10, "top_p": 0.25, "min_p": 0.125, "seed": 2**64 - 1},
            **{"repetition_penalty": 1.5, "presence_penalty": -2.0, "frequency_penalty": 2.0},
            **{"logit_bias": {7: -100.0}, "allowed_token_ids": [7, 8]},
        ),
        stopping=stopping(max_new_tokens=5, min_new_tokens=3, stop_token_ids=[9], ignore_eos=True),
        adapter_digest=DIGEST,
        adapter_scale=0.5,
        more_adapters=more((OTHER, None), ("ef" * 32, 0.0)),
        time_left=wire.duration(10),
        queue_timeout=wire.duration(2),
        time_limit=wire.duration(3),
        fairness_key="tenant",
        priority=gateway_pb2.PRIORITY_HIGH,
        cache_salt="salt",
        load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST,
        logprobs=3,
        prompt_logprobs=0,
    )

    result = submission(message)

    assert (result.session_id, result.session_slot, result.request_id) == (9, 3, "r-1")
    np.testing.assert_array_equal(result.prompt_token_ids, np.array([1, 2, 3], dtype=np.int32))
    np.testing.assert_array_equal(result.resumed_token_ids, np.array([4, 5], dtype=np.int32))
    assert result.prompt_token_ids.dtype == np.int32
    assert result.sampling == SamplingParams(
        temperature=0.5,
        top_k=10,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        seed=2**64 - 1,
        logit_bias={7: -100.0},
        allowed_token_ids=(7, 8),
        num_logprobs=3,
        prompt_logprobs=0,
    )
    assert result.stopping == StoppingParams(max_new_tokens=5, min_new_tokens=3, stop_token_ids=(9,), ignore_eos=True)
    assert (result.adapter_digest, result.adapter_scale) == (DIGEST, 0.5)
    assert result.more_adapters == (AdapterTerm(OTHER, 1.0), AdapterTerm("ef" * 32, 0.0))
    assert result.adapters == (AdapterTerm(DIGEST, 0.5), *result.more_adapters)
    assert (result.deadline_s, result.queue_deadline_s, result.time_limit_at_s) == (1010.0, 1002.0, 1003.0)
    assert (result.fairness_key, result.priority, result.cache_salt) == ("tenant", Priority.HIGH, "salt")
    assert result.fail_fast


def test_top_k_of_minus_one_keeps_all_tokens() -> None:
    assert submission(make_submit(sampling=sampling(top_k=-1))).sampling.top_k == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": list(range(32))}, "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 20, "resumed_token_ids": [1] * 12}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, 100]}, "prompt_token_ids[1]"),
        ({"prompt_token_ids": [2**32 - 1]}, "prompt_token_ids[0]"),
        ({"resumed_token_ids": [100]}, "resumed_token_ids[0]"),
        ({"resumed_token_ids": [1, 2], "stopping": stopping(max_new_tokens=2)}, "resumed_token_ids"),
        ({"slot": 2**31}, "slot"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"priority": 17}, "priority"),
        ({"load_policy": 17}, "load_policy"),
        ({"adapter_digest": "AB" * 32}, "adapter_digest"),
        ({"adapter_digest": "../../etc/passwd"}, "adapter_digest"),
        ({"adapter_scale": -0.5}, "adapter_scale"),
        ({"adapter_scale": math.inf}, "adapter_scale"),
        ({"adapter_scale": 100.5}, "adapter_scale"),
        ({"more_adapters": more((OTHER, 1.0))}, "more_adapters"),
        ({"adapter_digest": DIGEST, "more_adapters": more(("cd", 1.0))}, "more_adapters[0].digest"),
        ({"adapter_digest": DIGEST, "more_adapters": more((DIGEST, 0.5))}, "more_adapters[0].digest"),
        ({"adapter_digest": DIGEST, "more_adapters": more((OTHER, 1), (OTHER, 2))}, "more_adapters[1].digest"),
        ({"adapter_digest": DIGEST, "more_adapters": more((OTHER, -1.0))}, "more_adapters[0].scale"),
        ({"adapter_digest": DIGEST, "more_adapters": more((OTHER, math.nan))}, "more_adapters[0].scale"),
        ({"adapter_digest": DIGEST, "more_adapters": more((OTHER, 101.0))}, "more_adapters[0].scale"),
        ({"adapter_digest": DIGEST, "adapter_start": 1, "more_adapters": more((OTHER, 1.0))}, "more_adapters"),
        ({"adapter_digest": DIGEST, "more_adapters": more(*((f"{at:064x}", 1.0) for at in range(8)))}, "more_adapters"),
        ({"queue_timeout": wire.duration(-1)}, "queue_timeout"),
        ({"time_limit": wire.duration(-1)}, "time_limit"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"sampling": gateway_pb2.SamplingParams()}, "sampling.seed"),
        ({"sampling": sampling(temperature=-0.1)}, "sampling.temperature"),
        ({"sampling": sampling(temperature=100.5)}, "sampling.temperature"),
        ({"sampling": sampling(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": sampling(temperature=math.inf)}, "sampling.temperature"),
        ({"sampling": sampling(top_k=-2)}, "sampling.top_k"),
        ({"sampling": sampling(top_p=-0.5)}, "sampling.top_p"),
        ({"sampling": sampling(top_p=1.5)}, "sampling.top_p"),
        ({"sampling": sampling(min_p=1.5)}, "sampling.min_p"),
        ({"sampling": sampling(repetition_penalty=0.0)}, "sampling.repetition_penalty"),
        ({"sampling": sampling(repetition_penalty=11.0)}, "sampling.repetition_penalty"),
        ({"sampling": sampling(presence_penalty=2.5)}, "sampling.presence_penalty"),
        ({"sampling": sampling(frequency_penalty=-2.5)}, "sampling.frequency_penalty"),
        ({"sampling": sampling(logit_bias={100: 1.0})}, "sampling.logit_bias"),
        ({"sampling": sampling(logit_bias={1: 101.0})}, "sampling.logit_bias[1]"),
        ({"sampling": sampling(logit_bias={1: math.nan})}, "sampling.logit_bias[1]"),
        ({"sampling": sampling(allowed_token_ids=[100])}, "sampling.allowed_token_ids"),
        ({"sampling": sampling(allowed_token_ids=[1] * 1025)}, "sampling.allowed_token_ids"),
        ({"stopping": stopping(max_new_tokens=0)}, "stopping.max_new_tokens"),
        ({"stopping": stopping(max_new_tokens=2**31)}, "stopping.max_new_tokens"),
        ({"stopping": stopping(max_new_tokens=2, min_new_tokens=3)}, "stopping.min_new_tokens"),
        ({"stopping": stopping(stop_token_ids=[1] * 65)}, "stopping.stop_token_ids"),
        ({"stopping": stopping(stop_token_ids=[100])}, "stopping.stop_token_ids"),
        ({"stopping": stopping(stop_strings=["x"])}, "stopping.stop_strings"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_the_name_of_its_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        submission(make_submit(**fields))

    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    assert caught.value.field in caught.value.message


def test_prompt_probabilities_that_would_not_fit_a_message_are_refused_with_the_arithmetic() -> None:
    limits = RequestLimits(vocab_size=100, max_model_len=10_000)
    message = make_submit(prompt_token_ids=[1] * 5000, prompt_logprobs=20)

    with pytest.raises(InvalidParameterError, match="5000 prompt tokens x 21 entries = 105000"):
        wire.submission(message, session_id=1, limits=limits, now_s=0.0)


def test_a_deadline_that_has_passed_ends_the_request_at_once() -> None:
    with pytest.raises(DeadlineError):
        submission(make_submit(time_left=wire.duration(0)))


def test_a_greedy_request_needs_no_seed() -> None:
    message = make_submit(sampling=gateway_pb2.SamplingParams(temperature=0.0))

    assert submission(message).sampling.seed == 0


@pytest.mark.parametrize(
    ("draw", "stop", "is_taken"),
    [
        ({"allowed_token_ids": [7]}, {"min_new_tokens": 2}, False),
        ({"allowed_token_ids": [7, 9]}, {"min_new_tokens": 2, "stop_token_ids": [9]}, False),
        ({"allowed_token_ids": [7, 8]}, {"min_new_tokens": 2}, True),
        ({"allowed_token_ids": [7]}, {"min_new_tokens": 2, "ignore_eos": True}, True),
        ({"allowed_token_ids": [7]}, {}, True),
        ({}, {"min_new_tokens": 2}, True),
    ],
)
def test_a_request_that_bans_every_token_is_refused_by_name(
    draw: dict[str, object], stop: dict[str, object], is_taken: bool
) -> None:
    submit = make_submit(sampling=sampling(**draw), stopping=stopping(**stop))
    limits = RequestLimits(vocab_size=100, max_model_len=32, eos_token_ids=(7,))

    if is_taken:
        wire.submission(submit, session_id=9, limits=limits, now_s=1000.0)
        return
    with pytest.raises(InvalidParameterError, match="no token can be drawn") as caught:
        wire.submission(submit, session_id=9, limits=limits, now_s=1000.0)
    assert caught.value.field == "sampling.allowed_token_ids"


NEWER = b"\xfa\x3f\x01x"  # field 1023 of a later version, a string


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("", "1023"),
        ("sampling", "sampling.1023"),
        ("stopping", "stopping.1023"),
        ("structured_output", "structured_output.1023"),
        ("bad_token_sequences", r"bad_token_sequences\[1\].1023"),
        ("more_adapters", r"more_adapters\[1\].1023"),
    ],
)
def test_a_field_of_a_newer_gateway_is_refused_by_its_number(part: str, name: str) -> None:
    submit = make_submit(stopping=stopping(max_new_tokens=3))
    for _ in range(2):
        submit.bad_token_sequences.add().ids.append(5)
        submit.more_adapters.add()
    inner: Any = getattr(submit, part) if part else submit
    (inner[1] if part in ("bad_token_sequences", "more_adapters") else inner).MergeFromString(NEWER)

    with pytest.raises(NotSupportedError, match=f"field {name} of Submit.* update the engine"):
        submission(submit)


def with_ids(token_id: int) -> dict[str, dict[str, object]]:
    """Fields of a request that has a token id in one place each, by the place's name."""
    bad = [gateway_pb2.TokenIds(ids=[1, token_id])]
    return {
        "prompt_token_ids": {"prompt_token_ids": [1, token_id]},
        "resumed_token_ids": {"resumed_token_ids": [token_id]},
        "sampling.logit_bias": {"sampling": sampling(logit_bias={token_id: 1.0})},
        "sampling.allowed_token_ids": {"sampling": sampling(allowed_token_ids=[token_id])},
        "stopping.stop_token_ids": {"stopping": stopping(stop_token_ids=[token_id])},
        "bad_token_sequences": {"bad_token_sequences": bad},
    }


@pytest.mark.parametrize("field", list(with_ids(0)))
def test_an_id_behind_the_vocabulary_needs_an_adapter_and_its_range_ends(field: str) -> None:
    limits = RequestLimits(vocab_size=100, max_model_len=32, max_added_tokens=4)

    def read(token_id: int, **fields: object) -> Submission:
        message = make_submit(**with_ids(token_id)[field], **fields)
        return wire.submission(message, session_id=9, limits=limits, now_s=1000.0)

    assert read(103, adapter_digest=DIGEST).added_token_ids == (AddedTokenId(field, 103),)
    assert read(99, adapter_digest=DIGEST).added_token_ids == ()
    with pytest.raises(
        InvalidParameterError, match=r"token id 104 .* the 4 ids behind it .*--max-added-tokens"
    ) as caught:
        read(104, adapter_digest=DIGEST)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    with pytest.raises(InvalidParameterError, match="token id 100 is not below the vocabulary size 100"):
        read(100)


def test_what_a_structure_starts_after_is_of_the_vocabulary_or_added_by_an_adapter() -> None:
    limits = RequestLimits(vocab_size=100, max_model_len=32, max_added_tokens=4)

    def read(token_id: int, **fields: Any) -> Submission:
        wanted = gateway_pb2.StructuredOutput(regex="a", starts_after=[token_id])
        submit = make_submit(structured_output=wanted, **fields)
        return wire.submission(submit, session_id=9, limits=limits, now_s=1000.0)

    assert read(103, adapter_digest=DIGEST).added_token_ids == (AddedTokenId("structured_output.starts_after", 103),)
    for token_id, fields in ((104, {"adapter_digest": DIGEST}), (100, {})):
        with pytest.raises(InvalidParameterError, match="starts_after"):
            read(token_id, **fields)
