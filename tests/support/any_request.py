"""Requests that mix legal and boundary values of every option, and the properties that their answers must have."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.errors import DeadlineError, InvalidParameterError, LoraplexError, QueueTimeoutError
from support.base_models import tiny_tokenizer_json
from tokenizers import Tokenizer

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from support.engine_sessions import Outcome

VOCAB_SIZE: Final = 384
MAX_MODEL_LEN: Final = 64
MAX_BATCHED_TOKENS: Final = 32  # so that the longest prompts take several chunks even alone
EOS_IDS: Final = (1, 3)
ADAPTERS: Final = ("aa" * 32, "bb" * 32, "cc" * 32)
FLOAT_MIN: Final = 1.2e-38
INT32_MAX: Final = 2**31 - 1
ALL_TOKENS: Final = tuple(range(VOCAB_SIZE))

# None: the field is absent. A common value is in its list more than once.
SAMPLING: Final[dict[str, Sequence[Any]]] = {
    "temperature": (None, 0.0, 0.0, 0.0, FLOAT_MIN, 0.7, 1.0, 100.0),
    "top_k": (None, None, -1, 0, 1, 2, VOCAB_SIZE - 1, VOCAB_SIZE, INT32_MAX),
    "top_p": (None, None, FLOAT_MIN, 0.5, 0.999, 1.0),
    "min_p": (None, None, 0.0, FLOAT_MIN, 0.5, 1.0),
    "repetition_penalty": (None, None, None, FLOAT_MIN, 1.0, 1.3, 10.0),
    "presence_penalty": (None, None, None, -2.0, 0.0, 2.0),
    "frequency_penalty": (None, None, None, -2.0, 0.0, 2.0),
    "seed": (0, 1, 2**64 - 1),
    "logit_bias": (None, None, {5: 0.0}, {6: 100.0}, {7: -100.0, 8: 100.0}, dict.fromkeys(ALL_TOKENS, -100.0)),
    "allowed_token_ids": (None, None, None, (9,), (9, 1), (1, 3), (0, VOCAB_SIZE - 1), ALL_TOKENS),
}
STOPPING: Final[dict[str, Sequence[Any]]] = {
    "max_new_tokens": (1, 1, 2, 2, 3, 5, 8, 8, None, INT32_MAX),
    "min_new_tokens": (None, None, 0, 1, 2, INT32_MAX),
    "stop_token_ids": (None, None, (9,), (0, VOCAB_SIZE - 1), tuple(range(64))),
    "ignore_eos": (None, False, True),
}
RESPONSE: Final[dict[str, Sequence[Any]]] = {
    "logprobs": (None, None, 0, 0, 1, 20),
    "prompt_logprobs": (None, None, None, 0, 0, 1, 20),
    "adapter_digest": (None, *ADAPTERS),
    "adapter_scale": (None, None, 0.0, 1.0, 100.0),
    "priority": tuple(gateway_pb2.Priority.values()),
    "time_left": (None, None, None, None, 0.01, 3600.0),
    "queue_timeout": (None, None, None, None, 0.0, 3600.0),
    "time_limit": (None, None, None, None, 0.0, 3600.0),
    "fairness_key": (None, "", "k", "other"),
    "cache_salt": (None, "", "salt"),
    "request_id": (None, "", "r", "r" * 256),
}
PATTERN: Final = r"[a-f]{2}-\d{1,3}"
CHOICES: Final = ("yes", "no", "perhaps")
Structure = gateway_pb2.StructuredOutput
RULES: Final[dict[str, Sequence[Any]]] = {
    "structured_output": (
        *[None] * 12,
        Structure(regex=PATTERN),
        Structure(choice=Structure.Choices(choices=CHOICES)),
        Structure(json_schema='{"type": "array", "items": {"enum": [1, null, "x"]}, "maxItems": 3}'),
    ),
    "bad_token_sequences": (*[None] * 12, [(9,)], [(5, 6), (7,), (8, 8, 8)], [(token,) for token in range(40, 90)]),
}
PROMPT_LENGTHS: Final = (1, 2, 3, 15, 16, 17, MAX_BATCHED_TOKENS, MAX_BATCHED_TOKENS + 1, 50, MAX_MODEL_LEN - 1)
RESUMED_LENGTHS: Final = (0, 0, 0, 1, 2, 40, MAX_MODEL_LEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyRequest:
    """A request.

    Attributes:
        submit: The request as it is sent.
        most: Output tokens, resumed ones included, at which it ends.
        stops: Ids that end it.
    """

    submit: engine_pb2.Submit
    most: int
    stops: frozenset[int]


def make_request(rng: random.Random, slot: int) -> AnyRequest:
    """Return any legal request."""

    def pick(options: dict[str, Sequence[Any]]) -> dict[str, Any]:
        chosen = {name: rng.choice(values) for name, values in options.items()}
        return {name: value for name, value in chosen.items() if value is not None}

    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice(PROMPT_LENGTHS))]
    sampling, stopping, response = pick(SAMPLING), pick(STOPPING), pick(RESPONSE)
    if sampling.get("temperature") == 0.0 and rng.random() < 0.5:
        del sampling["seed"]  # the only case in which it may be absent
    room = MAX_MODEL_LEN - len(prompt)
    most = min(stopping.get("max_new_tokens", room), room)
    stopping["min_new_tokens"] = min(stopping.get("min_new_tokens", 0), stopping.get("max_new_tokens", INT32_MAX))
    num_resumed = min(rng.choice(RESUMED_LENGTHS), most - 1)
    for name in ("time_left", "queue_timeout", "time_limit"):
        if name in response:
            response[name] = Duration(seconds=int(response[name]), nanos=round(response[name] % 1 * 1e9))
    rules = pick(RULES)
    if "bad_token_sequences" in rules:
        rules["bad_token_sequences"] = [gateway_pb2.TokenIds(ids=ids) for ids in rules["bad_token_sequences"]]
    if "structured_output" in rules and rng.random() < 0.8:
        num_resumed = 0  # random tokens begin no structured output
    submit = engine_pb2.Submit(
        slot=slot,
        prompt_token_ids=prompt,
        resumed_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(num_resumed)],
        sampling=gateway_pb2.SamplingParams(**sampling),
        stopping=gateway_pb2.StoppingParams(**stopping),
        **response,
        **rules,
    )
    eos = () if submit.stopping.ignore_eos else EOS_IDS
    return AnyRequest(submit=submit, most=most, stops=frozenset((*submit.stopping.stop_token_ids, *eos)))


def check(request: AnyRequest, outcome: Outcome) -> None:
    """Assert that an answer is what the request asked for.

    Raises:
        AssertionError: If it is not.
    """
    if outcome.error is not None:
        assert _may_fail(request, outcome.failure), outcome.failure
    else:
        _check_end(request, outcome)
    _check_logprobs(request, outcome)
    _check_prompt_logprobs(request, outcome)
    allowed = request.submit.sampling.allowed_token_ids
    assert not allowed or set(outcome.token_ids) <= set(allowed)
    _check_bans(request, outcome)


def _may_fail(request: AnyRequest, error: LoraplexError) -> bool:
    """Tell whether a request can end so: its time was over, or it banned every token itself, or resumed another text."""
    submit = request.submit
    allowed = submit.sampling.allowed_token_ids
    is_impossible = bool(allowed) and set(allowed) <= request.stops and submit.stopping.min_new_tokens > 0
    narrows = bool(allowed or submit.bad_token_sequences or submit.stopping.min_new_tokens)
    is_impossible |= submit.HasField("structured_output") and (narrows or bool(submit.resumed_token_ids))
    is_impossible |= bool(submit.bad_token_sequences and allowed)
    return (
        (isinstance(error, DeadlineError) and submit.HasField("time_left"))
        or (isinstance(error, QueueTimeoutError) and submit.HasField("queue_timeout"))
        or (is_impossible and isinstance(error, InvalidParameterError))
    )


def _check_end(request: AnyRequest, outcome: Outcome) -> None:
    submit, finish = request.submit, outcome.finish
    assert finish is not None
    num_outputs = len(submit.resumed_token_ids) + len(outcome.token_ids)
    reason, least = finish.finish_reason, submit.stopping.min_new_tokens
    position = len(submit.resumed_token_ids)
    stopped = [n for n, token in enumerate(outcome.token_ids, position) if token in request.stops and n >= least]
    if submit.HasField("structured_output") and reason == gateway_pb2.FINISH_REASON_STOP:
        _check_structure(submit, outcome)
    elif reason == gateway_pb2.FINISH_REASON_STOP:
        assert stopped == [num_outputs - 1]
        assert finish.stop_token_id == outcome.token_ids[-1]
    elif reason == gateway_pb2.FINISH_REASON_TIME_LIMIT:
        assert submit.HasField("time_limit")
        assert not stopped
    else:
        assert reason == gateway_pb2.FINISH_REASON_LENGTH
        assert (num_outputs, stopped) == (request.most, [])


def _check_structure(submit: engine_pb2.Submit, outcome: Outcome) -> None:
    """Assert that an output which ended by itself is what was wanted; a stop id of the request's own may cut it."""
    assert outcome.finish is not None
    tokens = outcome.token_ids
    last = tokens[-1] if tokens else None
    if outcome.finish.HasField("stop_token_id"):
        assert outcome.finish.stop_token_id == last
        if last in submit.stopping.stop_token_ids and last not in EOS_IDS:
            return
    text, wanted = tokenizer().decode(tokens, skip_special_tokens=True), submit.structured_output
    if wanted.HasField("regex"):
        assert re.fullmatch(PATTERN, text), text
    elif wanted.HasField("choice"):
        assert text in CHOICES, text
    else:
        value = json.loads(text)
        assert len(value) <= 3, text
        assert all(each in (1, None, "x") for each in value), text


def _check_bans(request: AnyRequest, outcome: Outcome) -> None:
    resumed = list(request.submit.resumed_token_ids)
    output = resumed + outcome.token_ids
    for sequence in request.submit.bad_token_sequences:
        ids = list(sequence.ids)
        for end in range(len(resumed) + 1, len(output) + 1):
            assert output[max(0, end - len(ids)) : end] != ids, f"{ids} ends before {end}"


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the tiny model."""
    return Tokenizer.from_str(tiny_tokenizer_json(VOCAB_SIZE))


def _check_logprobs(request: AnyRequest, outcome: Outcome) -> None:
    if not request.submit.HasField("logprobs"):
        assert not outcome.logprobs
        return
    assert [entry.chosen.token_id for entry in outcome.logprobs] == outcome.token_ids
    assert all(len(entry.top) == request.submit.logprobs for entry in outcome.logprobs)
    assert all(entry.chosen.logprob <= 0 for entry in outcome.logprobs)


def _check_prompt_logprobs(request: AnyRequest, outcome: Outcome) -> None:
    submit = request.submit
    if outcome.started is None:
        assert not outcome.token_ids
        return
    entries = outcome.started.prompt_logprobs
    if not submit.HasField("prompt_logprobs"):
        assert not entries
        return
    chosen = [entry.chosen.token_id for entry in entries]
    assert chosen == list(submit.prompt_token_ids[1 : 1 + len(chosen)])
    assert all(len(entry.top) == submit.prompt_logprobs for entry in entries)
    if outcome.token_ids:
        assert len(entries) == len(submit.prompt_token_ids) - 1
