"""From an OpenAI request body to our requests: one per choice."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import new_request_id

from loraplex_gateway.openai import fields
from loraplex_gateway.openai.body import decode as decode
from loraplex_gateway.openai.chat_body import callable_tools, chat_prompt, names_function
from loraplex_gateway.openai.errors import BodyNames
from loraplex_gateway.openai.model_names import read_names
from loraplex_gateway.openai.output_format import constraint_field, structured_output
from loraplex_gateway.openai.prompts import MAX_CHOICES, completion_prompts
from loraplex_gateway.openai.schema import ChatBody, StreamOptions
from loraplex_gateway.requests.validation import REQUEST_ID_RULE, is_request_id
from loraplex_gateway.types import (
    ChatPrompt,
    GenerationRequest,
    Priority,
    ResponseOptions,
    Sampling,
    Stopping,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.openai.model_names import IsBase
    from loraplex_gateway.openai.schema import CommonBody, CompletionBody
    from loraplex_gateway.openai.tracing import Origin

SEEDS: Final = range(-(2**63), 2**64)
_TOKEN_ID: Final = re.compile(r"0|-?[1-9][0-9]{0,18}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to generate and how to answer.

    Attributes:
        requests: One per choice, in the order of the choices' indices.
        model: Name as the client wrote it, repeated in the answer.
        names: What errors call the body's fields.
        include_usage: Whether a stream ends in a chunk with the token counts of all choices.
        has_running_usage: Whether its other chunks carry their choice's counts so far.
        logprobs: Number of alternatives to show per position; None shows none.
        prompt_logprobs: As logprobs, for the prompt's tokens, in vLLM's form.
        is_echo: Whether a completion begins with the prompt.
        names_function: Whether tool_choice names the function to call: then the end is "stop", as OpenAI has it.
        shows_thoughts: Whether a chat's thoughts are part of the answer.
    """

    requests: tuple[GenerationRequest, ...]
    model: str
    names: BodyNames
    is_chat: bool
    is_stream: bool
    include_usage: bool
    has_running_usage: bool
    logprobs: int | None
    return_token_ids: bool
    prompt_logprobs: int | None = None
    is_echo: bool = False
    names_function: bool = False
    shows_thoughts: bool = True


def completion_plan(body: CompletionBody, is_base: IsBase, *, origin: Origin) -> Plan:
    """Return what a completion asks for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    request = _request(body, is_base, origin=origin, max_tokens=body.max_tokens, logprobs=body.logprobs)
    if body.echo:
        request = replace(request, options=_with_prompt(request.options))
    prompts = completion_prompts(body.prompt, add_special_tokens=body.add_special_tokens)
    plan = _plan(body, [replace(request, prompt=prompt) for prompt in prompts], logprobs=body.logprobs)
    return replace(plan, is_echo=body.echo)


def chat_plan(body: ChatBody, is_base: IsBase, *, origin: Origin) -> Plan:
    """Return what a chat completion asks for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidParameterError("top_logprobs is not supported without logprobs=true", field="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.max_tokens not in (None, max_tokens):
        raise InvalidParameterError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {max_tokens}; send one of them",
            field="max_tokens",
        )
    request = _request(body, is_base, origin=origin, max_tokens=max_tokens, logprobs=logprobs)
    prompt, parsing = chat_prompt(body)
    return _plan(body, [replace(request, prompt=prompt, parsing=parsing)], logprobs=logprobs)


def _with_prompt(options: ResponseOptions) -> ResponseOptions:
    """Return the options of an answer that begins with its prompt: `logprobs` is about the prompt's tokens as well."""
    asked = [count for count in (options.logprobs, options.prompt_logprobs) if count is not None]
    return replace(options, prompt_text=True, prompt_logprobs=max(asked, default=None))


def _request(
    body: CommonBody, is_base: IsBase, *, origin: Origin, max_tokens: int | None, logprobs: int | None
) -> GenerationRequest:
    """Return the request without its prompt. `model` names a base model or an adapter."""
    names = read_names(body.model, body.adapters, is_base)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationRequest(
        prompt=None,
        request_id=_own_id(body) or origin.request_id,
        trace_id=origin.trace_id,
        traceparent=origin.traceparent,
        model=names.base,
        adapter=names.adapter,
        adapters=names.adapters,
        sampling=_sampling(body),
        stopping=Stopping(
            max_new_tokens=max_tokens,
            min_new_tokens=body.min_tokens,
            stop_strings=tuple(stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            include_stop=body.include_stop_str_in_output,
        ),
        options=ResponseOptions(
            logprobs=logprobs, prompt_logprobs=body.prompt_logprobs, skip_special_tokens=body.skip_special_tokens
        ),
        queue_timeout_s=body.queue_timeout,
        time_limit_s=body.time_limit,
        cache_salt=body.cache_salt or "",
        affinity_key=body.affinity_key or "",
        priority=_priority(body.priority),
        fail_fast=body.load_policy == "fail_fast",
        adapter_scale=body.adapter_scale,
        structured_output=structured_output(body),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        truncates_end=body.truncation_side == "right",
    )


def _own_id(body: CommonBody) -> str | None:
    if body.request_id is not None and not is_request_id(body.request_id):
        raise InvalidParameterError(REQUEST_ID_RULE, field="request_id")  # before it becomes part of the answer's id
    return body.request_id


def _sampling(body: CommonBody) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=_seed(body.seed),
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
    )


def _seed(seed: int | None) -> int | None:
    """Return the seed as the engines count them; negative ones are those of signed 64 bits."""
    if seed is not None and seed not in SEEDS:
        raise InvalidParameterError(f"seed is {seed}; it must be in [-2^63, 2^64 - 1]", field="seed")
    return None if seed is None else seed % 2**64


def _plan(body: CommonBody, requests: list[GenerationRequest], *, logprobs: int | None) -> Plan:
    n = body.n
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidParameterError(
            "prompt_logprobs is not supported with stream=true: no chunk has a place for them", field="prompt_logprobs"
        )
    if not n >= 1 or n * len(requests) > MAX_CHOICES:
        raise InvalidParameterError(
            f"n is {n} for {len(requests)} prompts; n x prompts must be 1 to {MAX_CHOICES}", field="n"
        )
    options = body.stream_options or StreamOptions()
    is_chat = isinstance(body, ChatBody)
    table = fields.CHAT if is_chat else fields.COMPLETION
    choices = [_choice(request, prompt * n + i, i) for prompt, request in enumerate(requests) for i in range(n)]
    return Plan(
        requests=tuple(choices),
        model=body.model,
        names=BodyNames(table, body, constraint=constraining_field(body), callable_tools=callable_of(body, requests)),
        is_chat=is_chat,
        is_stream=body.stream,
        include_usage=options.include_usage,
        has_running_usage=options.include_usage and options.continuous_usage_stats,
        logprobs=logprobs,
        return_token_ids=body.return_token_ids,
        prompt_logprobs=body.prompt_logprobs,
        names_function=isinstance(body, ChatBody) and names_function(body.tool_choice),
        shows_thoughts=not isinstance(body, ChatBody) or body.include_reasoning,
    )


def callable_of(body: CommonBody, requests: Sequence[GenerationRequest]) -> Sequence[int]:
    """Return which of a body's `tools` may be called."""
    prompt = requests[0].prompt
    return callable_tools(body, prompt) if isinstance(body, ChatBody) and isinstance(prompt, ChatPrompt) else ()


def constraining_field(body: CommonBody) -> str:
    """Return the field that constrains the output, `tools` for one that must or may be a call; empty if none does."""
    return constraint_field(body) or ("tools" if isinstance(body, ChatBody) and body.tools else "")


def _choice(request: GenerationRequest, index: int, draw: int) -> GenerationRequest:
    """Return the request of one choice: an id of its own, and a seed of its own where the client gave one."""
    if index == 0:
        return request
    seed = request.sampling.seed
    sampling = request.sampling if seed is None else replace(request.sampling, seed=(seed + draw) % 2**64)
    return replace(request, request_id=new_request_id(), sampling=sampling)


def _priority(given: int | str | None) -> Priority | None:
    """Return the class of service, None if none is given; vLLM's numbers say "sooner" by being lower."""
    if given is None:
        return None
    if isinstance(given, str):
        return Priority[given.upper()]
    return Priority.HIGH if given < 0 else Priority.BATCH if given > 0 else Priority.NORMAL


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    bad = next((token_id for token_id in bias if not _TOKEN_ID.fullmatch(token_id)), None)
    if bad is not None:
        raise InvalidParameterError(f"logit_bias: {bad[:64]!r} is no token id", field="logit_bias")
    return {int(token_id): value for token_id, value in bias.items()}
