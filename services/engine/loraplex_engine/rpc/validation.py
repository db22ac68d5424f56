"""Checks what a gateway submits: each field has a range, and a violation names the field and the range.

The ranges are those of `loraplex_common.request_limits`. The engine checks them again, because a session carries
requests of many clients, and a bad value must end only its own request, before it gets near a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import is_digest
from loraplex_common.request_limits import (
    MAX_ENTRIES,
    MAX_INT32,
    MAX_PROMPT_LOGPROBS,
    NOTHING_LEFT,
    RANGES,
    Range,
    leaves_nothing,
)

from loraplex_engine.sampling_params import AddedTokenId, SamplingParams, StoppingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loraplex.v1 import engine_pb2, gateway_pb2
    from numpy.typing import NDArray

MAX_REQUEST_ID_BYTES: Final = 256
SMALLEST: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of the served model.

    Attributes:
        max_model_len: Most tokens of prompt and output together.
        eos_token_ids: The model's end-of-text ids.
        max_added_tokens: Ids behind the vocabulary that an adapter may add.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_added_tokens: int = 0

    def check_ids(self, ids: Sequence[int], field: str, submit: engine_pb2.Submit) -> NDArray[np.int32]:
        """Return token ids as int32 ``[len(ids)]`` if each can exist: which an adapter adds is known once its image is here.

        Raises:
            InvalidParameterError: If one cannot; names the first.
        """
        return check_token_ids(ids, field, self.vocab_size, self.max_added_tokens if submit.adapter_digest else 0)


def require(condition: bool, field: str, message: str) -> None:
    """Refuse the request unless the condition holds.

    Raises:
        InvalidParameterError: Names the field in a `BadRequest` violation.
    """
    if not condition:
        raise InvalidParameterError(f"{field}: {message}", field=field)


def check_range(value: float, field: str) -> float:
    """Return the value if it is in the range of the last part of the field's name.

    Raises:
        InvalidParameterError: If the value is out of range; NaN and infinities always are.
    """
    return check_within(value, RANGES[field.rpartition(".")[2]], field)


def check_within(value: float, limits: Range, field: str) -> float:
    """Return a number if it is in a range.

    Raises:
        InvalidParameterError: If it is not.
    """
    require(
        value in limits,
        field,
        f"{value:g} is not in {'(' if limits.excludes_low else '['}{limits.low:g}, {limits.high:g}]",
    )
    return value


def check_token_ids(ids: Sequence[int], field: str, vocab_size: int, num_added: int = 0) -> NDArray[np.int32]:
    """Return token ids as int32 ``[len(ids)]`` if each is below the vocabulary size, or among those behind it.

    Raises:
        InvalidParameterError: If one is not; names the first.
    """
    array = np.fromiter(ids, np.int64, count=len(ids))
    if array.size and int(array.max()) >= vocab_size + num_added:
        position = int(np.argmax(array >= vocab_size + num_added))
        what = f"token id {array[position]} is not below the vocabulary size {vocab_size}"
        added = f", nor among the {num_added} ids behind it that an adapter may add (--max-added-tokens)"
        require(False, f"{field}[{position}]", what + added if num_added else what)
    return array.astype(np.int32)


def check_digest(digest: str, field: str) -> str:
    """Return the digest if it is 64 lower-case hex digits.

    Raises:
        InvalidParameterError: If it is not.
    """
    require(is_digest(digest), field, f"{digest[:80]!r} is not 64 lower-case hex digits")
    return digest


def check_tokens(submit: engine_pb2.Submit, limits: RequestLimits) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return prompt and resumed token ids, which together leave room for at least one more token.

    Raises:
        InvalidParameterError: If the prompt is empty or too long, or an id does not exist.
    """
    num_tokens = len(submit.prompt_token_ids) + len(submit.resumed_token_ids)
    require(len(submit.prompt_token_ids) > 0, "prompt_token_ids", "the prompt is empty")
    require(
        num_tokens < limits.max_model_len,
        "prompt_token_ids",
        f"{num_tokens} tokens leave no room for output: prompt and output together are at most {limits.max_model_len}",
    )
    prompt = limits.check_ids(submit.prompt_token_ids, "prompt_token_ids", submit)
    return prompt, limits.check_ids(submit.resumed_token_ids, "resumed_token_ids", submit)


def added_token_ids(submit: engine_pb2.Submit, limits: RequestLimits) -> tuple[AddedTokenId, ...]:
    """Return the largest id behind the vocabulary of each field that has one; the ids are checked already."""
    if not submit.adapter_digest:
        return ()
    bad = [each for sequence in submit.bad_token_sequences for each in sequence.ids]
    fields: dict[str, Iterable[int]] = {
        "prompt_token_ids": submit.prompt_token_ids,
        "resumed_token_ids": submit.resumed_token_ids,
        "sampling.logit_bias": submit.sampling.logit_bias,
        "sampling.allowed_token_ids": submit.sampling.allowed_token_ids,
        "stopping.stop_token_ids": submit.stopping.stop_token_ids,
        "bad_token_sequences": bad,
        "structured_output.starts_after": submit.structured_output.starts_after,
    }
    largest = (AddedTokenId(field, max(ids, default=0)) for field, ids in fields.items())
    return tuple(each for each in largest if each.token_id >= limits.vocab_size)


def check_sampling(submit: engine_pb2.Submit, limits: RequestLimits) -> SamplingParams:
    """Return the request's sampling parameters, unset fields at their defaults.

    Raises:
        InvalidParameterError: If a value is out of its range.
    """
    wire = submit.sampling
    temperature = _in_range(wire, "temperature", 1.0)
    require(
        wire.HasField("seed") or temperature == 0.0, "sampling.seed", "must be set where tokens are drawn at random"
    )
    return SamplingParams(
        temperature=temperature,
        top_k=max(int(_in_range(wire, "top_k", 0)), 0),
        # 0 keeps what the smallest number above 0 keeps: the likeliest token.
        top_p=max(_in_range(wire, "top_p", 1.0), SMALLEST),
        min_p=_in_range(wire, "min_p", 0.0),
        repetition_penalty=_in_range(wire, "repetition_penalty", 1.0),
        presence_penalty=_in_range(wire, "presence_penalty", 0.0),
        frequency_penalty=_in_range(wire, "frequency_penalty", 0.0),
        seed=wire.seed,
        logit_bias=_check_logit_bias(submit, limits),
        allowed_token_ids=_check_token_set(wire.allowed_token_ids, "sampling.allowed_token_ids", limits, submit),
        num_logprobs=_check_logprobs(submit, "logprobs"),
        prompt_logprobs=_check_prompt_logprobs(submit),
    )


def check_stopping(submit: engine_pb2.Submit, limits: RequestLimits) -> StoppingParams:
    """Return the request's stopping conditions.

    Raises:
        InvalidParameterError: If a value is out of its range, or stop strings are given, which the engine cannot
            check.
    """
    wire, num_resumed = submit.stopping, len(submit.resumed_token_ids)
    require(
        not wire.stop_strings,
        "stopping.stop_strings",
        "stop strings are the gateway's business, the engine sees token ids",
    )
    max_new_tokens = wire.max_new_tokens if wire.HasField("max_new_tokens") else None
    if max_new_tokens is not None:
        check_range(max_new_tokens, "stopping.max_new_tokens")
        require(
            num_resumed < max_new_tokens,
            "resumed_token_ids",
            f"{num_resumed} tokens are all of max_new_tokens {max_new_tokens}",
        )
    ceiling = MAX_INT32 if max_new_tokens is None else max_new_tokens
    require(
        wire.min_new_tokens <= ceiling,
        "stopping.min_new_tokens",
        f"{wire.min_new_tokens} exceeds max_new_tokens {ceiling}",
    )
    return StoppingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=wire.min_new_tokens,
        stop_token_ids=_check_token_set(wire.stop_token_ids, "stopping.stop_token_ids", limits, submit),
        ignore_eos=wire.ignore_eos,
    )


def check_drawable(sampling: SamplingParams, stopping: StoppingParams, limits: RequestLimits) -> None:
    """Refuse a request that bans every token.

    Raises:
        InvalidParameterError: Names the allowed ids.
    """
    banned = (*stopping.stop_token_ids, *(() if stopping.ignore_eos else limits.eos_token_ids))
    is_empty = leaves_nothing(
        allowed_token_ids=sampling.allowed_token_ids,
        banned_token_ids=banned,
        min_new_tokens=stopping.min_new_tokens,
        vocab_size=limits.vocab_size,
    )
    require(not is_empty, "sampling.allowed_token_ids", NOTHING_LEFT)


def _in_range(wire: gateway_pb2.SamplingParams, name: str, default: float) -> float:
    value: float = getattr(wire, name) if wire.HasField(name) else default  # type: ignore[arg-type]
    return check_range(value, f"sampling.{name}")


def _check_token_set(
    ids: Iterable[int], field: str, limits: RequestLimits, submit: engine_pb2.Submit
) -> tuple[int, ...]:
    listed = tuple(ids)
    limit = MAX_ENTRIES[field.rpartition(".")[2]]
    require(len(listed) <= limit, field, f"{len(listed)} entries exceed {limit}")
    limits.check_ids(listed, field, submit)
    return listed


def _check_logit_bias(submit: engine_pb2.Submit, limits: RequestLimits) -> dict[int, float]:
    field, bias = "sampling.logit_bias", submit.sampling.logit_bias
    _check_token_set(bias, field, limits, submit)
    for token_id, value in bias.items():
        require(value in RANGES["logit_bias"], f"{field}[{token_id}]", f"{value:g} is not in [-100, 100]")
    return dict(bias)


def _check_logprobs(submit: engine_pb2.Submit, field: str) -> int:
    if not submit.HasField(field):  # type: ignore[arg-type]
        return -1
    value: int = getattr(submit, field)
    return int(check_range(value, field))


def _check_prompt_logprobs(submit: engine_pb2.Submit) -> int:
    value = _check_logprobs(submit, "prompt_logprobs")
    num_entries = (value + 1) * len(submit.prompt_token_ids)
    require(
        num_entries <= MAX_PROMPT_LOGPROBS,
        "prompt_logprobs",
        f"{len(submit.prompt_token_ids)} prompt tokens x {value + 1} entries = {num_entries} exceed {MAX_PROMPT_LOGPROBS}",
    )
    return value
