"""Turns the keyword arguments of ``generate`` and friends into wire messages; shared by both clients."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence  # noqa: TC003 (readers of the options' types evaluate them)
from typing import Any, Final, Literal, TypedDict

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError

from loraplex_client._conversations import ChatMessage as ChatMessage
from loraplex_client._conversations import chat_messages


class PromptOptions(TypedDict, total=False):
    """What to continue; exactly one of the three prompts.

    Attributes:
        prompt: Text, tokenised with the model's special tokens.
        prompt_token_ids: Token ids, used as they are.
        messages: A conversation, rendered through the model's chat template.
        chat_template_kwargs: Further variables of the chat template, JSON values; e.g. ``{"enable_thinking": False}``.
        tools: Functions that the model is told of, OpenAI's ``tools``; the output is text as the model writes it.
        model: Base model; may be left out where the gateway fronts exactly one.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    messages: Sequence[ChatMessage] | None
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    model: str | None


class GenerateOptions(PromptOptions, total=False):
    """Keyword arguments of ``generate``. What is left out takes the model's, then the server's default.

    Attributes:
        adapter: ``name``, ``name:label`` or ``name@revision``; left out: the base model itself.
        adapter_scale: Multiplies the adapter's own scaling, 0 to 100.
        adapters: Instead of both: up to 8 pairs of a name and a weight of 0 to 100, e.g. ``[("poet", 0.5), ("json", 1.0)]``;
            the adapters' effects are added up, each times its weight.
        add_generation_prompt: Whether the chat template opens the assistant's turn. Default true.
        continue_final_message: Whether the last assistant turn is continued, not closed.
        max_new_tokens: Most tokens to generate; 0 only reads the prompt. Default: what is left of the longest sequence.
        min_new_tokens: Tokens before which nothing may end the output.
        stop: String or strings that end the output.
        stop_token_ids: Token ids that end the output, besides the model's end-of-text ids.
        ignore_eos: Whether end-of-text ids are ordinary tokens.
        include_stop: Whether the matched stop string stays in the text.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set whose probability reaches p; 0 leaves the likeliest token alone.
        min_p: Keep tokens at least this many times as likely as the likeliest.
        seed: Same seed, same prompt, same revision: same output.
        repetition_penalty: Divides logits of tokens seen in prompt or output.
        presence_penalty: Subtracted once from logits of tokens in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        logit_bias: Token id -> what is added to its logit.
        allowed_token_ids: If given, only these can be drawn.
        bad_words: String or strings that are never generated, at their beginning or after a space.
        structured_output: What the output must look like: a mapping with one of ``json_schema`` (the schema, or its text),
            ``regex``, ``choice`` (strings), ``grammar``, ``structural_tag`` (as JSON or its text) and ``json_object`` (True).
        truncate_prompt_tokens: Keep only so many of the prompt's last tokens; -1 as many as leave room for the output.
        logprobs: Probabilities of the drawn token and this many likeliest ones.
        prompt_logprobs: As ``logprobs``, for the prompt.
        skip_special_tokens: Whether special tokens are left out of the text. Default true.
        priority: ``batch``, ``normal`` (default) or ``high``, at most what the API key allows.
        queue_timeout_s: Longest wait for a place in a batch, in seconds.
        time_limit_s: Longest time from admission, in seconds; then the stream ends normally with partial text.
        cache_salt: A tenant's requests share cached prefixes only under equal salts; two tenants' do not.
        affinity_key: A tenant's requests with equal keys prefer the same engine.
        load_policy: ``wait`` (default) or ``fail_fast`` when the adapter is not resident.
        progress_events: Whether Accepted, Queued and AdapterLoading are sent; ends retries earlier.
        request_id: UUID4; drawn by the client if left out.
        timeout: Deadline of the whole call, in seconds.
        resume: Whether a stream whose connection or gateway is lost goes on through the next one. Default true.
    """

    adapter: str | None
    adapter_scale: float | None
    adapters: Sequence[tuple[str, float]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    structured_output: Mapping[str, Any] | None
    truncate_prompt_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    priority: Literal["batch", "normal", "high"] | None
    queue_timeout_s: float | None
    time_limit_s: float | None
    cache_salt: str | None
    affinity_key: str | None
    load_policy: Literal["wait", "fail_fast"] | None
    progress_events: bool | None
    request_id: str | None
    timeout: float | None
    resume: bool | None


# Options that are a field of the same name: option -> submessage ("" means the request itself).
_SCALARS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("model", "adapter", "adapter_scale", "cache_salt", "affinity_key", "progress_events"), ""),
    "truncate_prompt_tokens": "",
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed"), "sampling"),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), "sampling"),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "ignore_eos", "include_stop"), "stopping"),
    **dict.fromkeys(("logprobs", "prompt_logprobs", "skip_special_tokens"), "response_options"),
}
_REPEATED: Final[Mapping[str, tuple[str, str]]] = {
    "stop": ("stopping", "stop_strings"),
    "stop_token_ids": ("stopping", "stop_token_ids"),
    "allowed_token_ids": ("sampling", "allowed_token_ids"),
    "bad_words": ("sampling", "bad_words"),
}
_DURATIONS: Final[Mapping[str, str]] = {"queue_timeout_s": "queue_timeout", "time_limit_s": "time_limit"}
_ENUMS: Final[Mapping[str, Callable[[str], int]]] = {
    "priority": lambda value: gateway_pb2.Priority.Value(f"PRIORITY_{value.upper()}"),
    "load_policy": lambda value: gateway_pb2.LoadPolicy.Value(f"LOAD_POLICY_{value.upper()}"),
}
_PROMPTS: Final = ("prompt", "prompt_token_ids", "messages")
_CHAT_FLAGS: Final = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


def generate_request(options: GenerateOptions) -> gateway_pb2.GenerateRequest:
    """Build the request of one generation; ``timeout`` and ``resume`` belong to the call, not to the message.

    Raises:
        InvalidParameterError: If there is not exactly one prompt, or a value does not fit its field.
        TypeError: If an option does not exist.
    """
    unknown = [name for name in options if name not in GenerateOptions.__annotations__]
    if unknown:  # whatever its value: what is misspelt must not look as if it were set
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for of_the_call in ("timeout", "resume"):
        given.pop(of_the_call, None)
    request = gateway_pb2.GenerateRequest(request_id=given.pop("request_id", "") or str(uuid.uuid4()))
    _set_prompt(request, given)
    for name, value in given.items():
        try:
            _set_option(request, name, value)
        except (ValueError, OverflowError, TypeError, AttributeError) as error:
            raise InvalidParameterError(f"{name}={value!r}: {error}", field=name) from error
    return request


def tokenize_request(
    *,
    prompt: str | None,
    messages: Sequence[ChatMessage] | None,
    model: str | None,
    adapter: str,
    adapters: Sequence[tuple[str, float]] | None,
    add_special_tokens: bool | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> gateway_pb2.TokenizeRequest:
    """Build a TokenizeRequest from a prompt or messages; None leaves an option to the server.

    Raises:
        InvalidParameterError: If there is not exactly one prompt, or an option goes with the other kind.
    """
    request = gateway_pb2.TokenizeRequest(
        model=model or "", adapter=adapter or None, add_special_tokens=add_special_tokens
    )
    try:
        request.adapters.extend(_weighted_adapters(adapters or ()))
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidParameterError(f"adapters={adapters!r}: {error}", field="adapters") from error
    options: dict[str, Any] = {
        "prompt": prompt,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "chat_template_kwargs": chat_template_kwargs,
        "tools": tools,
    }
    _set_prompt(request, {name: value for name, value in options.items() if value is not None})
    return request


def _set_prompt(request: gateway_pb2.GenerateRequest | gateway_pb2.TokenizeRequest, given: dict[str, Any]) -> None:
    prompts = {name: given.pop(name) for name in _PROMPTS if name in given}
    flags = {name: given.pop(name) for name in _CHAT_FLAGS if name in given}
    if len(prompts) != 1:
        kinds = _PROMPTS if isinstance(request, gateway_pb2.GenerateRequest) else ("prompt", "messages")
        raise InvalidParameterError(f"give exactly one of {', '.join(kinds)}", field="prompt")
    ((name, value),) = prompts.items()
    if flags and name != "messages":
        raise InvalidParameterError(f"{', '.join(flags)} goes with messages only", field=next(iter(flags)))
    try:
        if name == "prompt":
            request.text = value
        elif isinstance(request, gateway_pb2.GenerateRequest) and name == "prompt_token_ids":
            request.token_ids.ids.extend(value)
            request.token_ids.SetInParent()  # an empty list is still a prompt, for the gateway to refuse
        else:
            request.messages.CopyFrom(chat_messages(value, **flags))
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidParameterError(f"{name}: {error}", field=name) from error


def _set_option(request: gateway_pb2.GenerateRequest, name: str, value: Any) -> None:
    if name in _SCALARS:
        target = getattr(request, _SCALARS[name]) if _SCALARS[name] else request
        setattr(target, name, value)
    elif name in _REPEATED:
        message, field = _REPEATED[name]
        getattr(getattr(request, message), field).extend([value] if isinstance(value, str) else value)
    elif name in _DURATIONS:
        getattr(request, _DURATIONS[name]).CopyFrom(duration(value))
    elif name in _ENUMS:
        setattr(request, name, _ENUMS[name](value))
    elif name == "adapters":
        request.adapters.extend(_weighted_adapters(value))
    elif name == "structured_output":
        request.structured_output.CopyFrom(_structured_output(value))
    else:
        assert name == "logit_bias", name  # all others of GenerateOptions have been named above
        request.sampling.logit_bias.update(value)


def _weighted_adapters(given: Sequence[tuple[str, float]]) -> list[gateway_pb2.WeightedAdapter]:
    pairs = list(given)  # an iterator, such as a zip, gives its pairs once; were they lost, the base model would answer
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError("each adapter is a pair of its name and its weight")
    return [gateway_pb2.WeightedAdapter(name=name, weight=weight) for name, weight in pairs]


def _structured_output(wanted: Mapping[str, Any]) -> gateway_pb2.StructuredOutput:
    if len(wanted) != 1:
        raise ValueError("it must have exactly one constraint")
    ((kind, value),) = wanted.items()
    if kind == "choice":
        value = gateway_pb2.StructuredOutput.Choices(choices=value)
    elif kind in ("json_schema", "structural_tag") and not isinstance(value, str):
        value = json.dumps(value, allow_nan=False)
    return gateway_pb2.StructuredOutput(**{kind: value})


def duration(seconds: float) -> Duration:
    """Return seconds as a protobuf Duration."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result
