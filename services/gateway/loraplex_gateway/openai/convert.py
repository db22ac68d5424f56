"""From an OpenAI request body to our requests: one per choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.schema import ChatBody, ChatTurn, CommonBody, CompletionBody
from loraplex_gateway.types import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Priority,
    ResponseOptions,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from loraplex_gateway.validation import MAX_REQUEST_ID_CHARS, REQUEST_ID_RULE, is_request_id

if TYPE_CHECKING:
    from loraplex_gateway.models import ModelCatalog
    from loraplex_gateway.types import Prompt

MAX_CHOICES: Final = 128
REFUSED: Final = {
    "prompt_logprobs": "ask for them over gRPC",
    "guided_json": "output is not constrained",
    "guided_regex": "output is not constrained",
    "guided_choice": "output is not constrained",
    "guided_grammar": "output is not constrained",
    "structured_outputs": "output is not constrained",
    "use_beam_search": "tokens are drawn one by one",
    "bad_words": "use logit_bias",
    "truncate_prompt_tokens": "the prompt is used whole or refused",
}

Body = TypeVar("Body", bound=CommonBody)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to generate and how to answer.

    Attributes:
        requests: One per choice, in the order of the choices' indices.
        model: Name as the client wrote it, repeated in the answer.
        logprobs: Number of alternatives to show per position; None shows none.
    """

    requests: tuple[GenerationRequest, ...]
    model: str
    is_chat: bool
    is_stream: bool
    include_usage: bool
    logprobs: int | None
    return_token_ids: bool


def decode(data: bytes, body: type[Body]) -> Body:
    """Read a request body.

    Raises:
        InvalidParameterError: If it is no JSON, or a field has the wrong type; the field is named.
    """
    try:
        return msgspec.json.decode(data, type=body, strict=False)
    except msgspec.ValidationError as error:
        text = str(error)
        field = text.rpartition("`$.")[2].rstrip("`") if "`$." in text else "body"
        raise InvalidParameterError(text, field=field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidParameterError(f"the body is no valid JSON in UTF-8: {error}", field="body") from error


def completion_plan(body: CompletionBody, catalog: ModelCatalog, *, request_id: str) -> Plan:
    """Return what a completion asks for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    _refuse(body.echo, "echo", "the prompt's text is not repeated; put it in front of the completion yourself")
    _refuse(body.suffix, "suffix", "the models served here do not fill in the middle")
    _refuse(body.best_of not in (None, body.n or 1), "best_of", "only n choices are drawn; leave it out")
    request = _request(body, catalog, request_id=request_id, max_tokens=body.max_tokens, logprobs=body.logprobs)
    prompts = _prompts(body.prompt, add_special_tokens=body.add_special_tokens)
    return _plan(body, [replace(request, prompt=prompt) for prompt in prompts], is_chat=False, logprobs=body.logprobs)


def chat_plan(body: ChatBody, catalog: ModelCatalog, *, request_id: str) -> Plan:
    """Return what a chat completion asks for.

    Raises:
        InvalidParameterError: For what is not served.
    """
    _refuse(body.echo, "echo", "the prompt is not repeated")
    _refuse(body.chat_template, "chat_template", "conversations are rendered by the model's own template")
    _refuse(body.documents, "documents", "put them into a message")
    _refuse(body.tools or body.functions, "tools", "tool calling is not served")
    _refuse(
        (body.response_format or {"type": "text"}).get("type") != "text",
        "response_format",
        "output is not constrained; only text is served",
    )
    _refuse(body.audio or (body.modalities or ["text"]) != ["text"], "modalities", "only text is served")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    _refuse(body.top_logprobs and not body.logprobs, "top_logprobs", "it needs logprobs=true")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    request = _request(body, catalog, request_id=request_id, max_tokens=max_tokens, logprobs=logprobs)
    prompt = ChatPrompt(
        messages=tuple(_message(n, turn) for n, turn in enumerate(body.messages)),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs or {},
    )
    return _plan(body, [replace(request, prompt=prompt)], is_chat=True, logprobs=logprobs)


def _request(
    body: CommonBody, catalog: ModelCatalog, *, request_id: str, max_tokens: int | None, logprobs: int | None
) -> GenerationRequest:
    """Return the request without its prompt. `model` names a base model or an adapter."""
    for field, reason in REFUSED.items():
        _refuse(getattr(body, field), field, reason)
    if body.request_id and not is_request_id(body.request_id):
        raise InvalidParameterError(REQUEST_ID_RULE, field="request_id")  # before it is put into a header
    is_base = catalog.find(body.model) is not None
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationRequest(
        prompt=None,
        request_id=body.request_id or request_id,
        model=body.model if is_base else "",
        adapter="" if is_base else body.model,
        sampling=_sampling(body),
        stopping=Stopping(
            max_new_tokens=max_tokens,
            min_new_tokens=body.min_tokens,
            stop_strings=tuple(stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            include_stop=body.include_stop_str_in_output,
        ),
        options=ResponseOptions(logprobs=logprobs, skip_special_tokens=body.skip_special_tokens),
        queue_timeout_s=body.queue_timeout,
        time_limit_s=body.time_limit,
        cache_salt=body.cache_salt or "",
        affinity_key=body.affinity_key or "",
        priority=_priority(body.priority),
        fail_fast=body.load_policy == "fail_fast",
        adapter_scale=body.adapter_scale,
    )


def _sampling(body: CommonBody) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=body.seed % 2**64 if body.seed is not None else None,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
    )


def _plan(body: CommonBody, requests: list[GenerationRequest], *, is_chat: bool, logprobs: int | None) -> Plan:
    n = 1 if body.n is None else body.n
    if not n >= 1 or n * len(requests) > MAX_CHOICES:
        raise InvalidParameterError(
            f"n is {n} for {len(requests)} prompts; n x prompts must be 1 to {MAX_CHOICES}", field="n"
        )
    choices = [_choice(request, prompt * n + i, i) for prompt, request in enumerate(requests) for i in range(n)]
    return Plan(
        requests=tuple(choices),
        model=body.model,
        is_chat=is_chat,
        is_stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        logprobs=logprobs,
        return_token_ids=body.return_token_ids,
    )


def _choice(request: GenerationRequest, index: int, draw: int) -> GenerationRequest:
    """Return the request of one choice: its own id, and its own seed where the client gave one."""
    if index == 0:
        return request
    seed = request.sampling.seed
    sampling = request.sampling if seed is None else replace(request.sampling, seed=(seed + draw) % 2**64)
    return replace(request, request_id=f"{request.request_id[: MAX_REQUEST_ID_CHARS - 4]}-{index}", sampling=sampling)


def _prompts(prompt: str | list[Any], *, add_special_tokens: bool) -> list[Prompt]:
    """Return the prompts of the four shapes that OpenAI allows: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [TextPrompt(text=prompt, add_special_tokens=add_special_tokens)]
    if not prompt:
        raise InvalidParameterError("the prompt is empty", field="prompt")
    if all(isinstance(item, int) for item in prompt):
        return [TokenPrompt(ids=tuple(prompt))]
    result: list[Prompt] = []
    for item in prompt:
        if isinstance(item, str):
            result.append(TextPrompt(text=item, add_special_tokens=add_special_tokens))
        elif isinstance(item, list) and all(isinstance(token_id, int) for token_id in item):
            result.append(TokenPrompt(ids=tuple(item)))
        else:
            raise InvalidParameterError("prompt must be text, token ids, or a list of either", field="prompt")
    return result


def _message(n: int, turn: ChatTurn) -> ChatMessage:
    _refuse(turn.tool_calls, f"messages[{n}].tool_calls", "tool calling is not served")
    content = turn.content or ""
    if isinstance(content, list):
        for part in content:
            _refuse(part.type != "text", f"messages[{n}].content", f"parts of type {part.type!r} are not served")
        content = "\n".join(part.text or "" for part in content)
    # Newer clients say developer where models and their templates know system.
    role = "system" if turn.role == "developer" else turn.role
    return ChatMessage(role=role, content=content, name=turn.name)


def _priority(given: int | str | None) -> Priority:
    """Return the class of service; vLLM's numbers say "sooner" by being lower."""
    if isinstance(given, str):
        return Priority[given.upper()]
    number = given or 0
    return Priority.HIGH if number < 0 else Priority.BATCH if number > 0 else Priority.NORMAL


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except ValueError as error:
        raise InvalidParameterError("logit_bias must map token ids to numbers", field="logit_bias") from error


def _refuse(is_asked_for: object, field: str, reason: str) -> None:
    if is_asked_for:
        raise InvalidParameterError(f"{field} is not supported: {reason}", field=field)
