"""Bodies of the OpenAI API's requests, with the further knobs that vLLM's users send as extra body.

Only the fields that `fields` calls served are here, each with its type; `body` has dealt with all others before.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of a streamed response."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The schema of a response format. Its name and description say what it is for; the output depends on the schema."""

    schema: Any
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for a form of the output; a structural tag brings the other fields, as vLLM has it."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = None
    structures: list[Any] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's way to ask for a form of the output."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    json_object: bool | None = None


class BodyAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of the adapters that a request adds up."""

    name: str
    weight: float | None = None


class CommonBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion share; unset means the model's default."""

    model: str
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    # Extra body, as vLLM names it.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool = False
    cache_salt: str | None = None
    request_id: str | None = None
    # Extra body of our own.
    adapter_scale: float | None = None
    adapters: list[BodyAdapter] | None = None
    queue_timeout: float | None = None
    time_limit: float | None = None
    affinity_key: str | None = None
    priority: int | Literal["batch", "normal", "high"] | None = None
    load_policy: Literal["wait", "fail_fast"] | None = None


class CompletionBody(CommonBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function of a call: arguments are the text of a JSON object, or the object."""

    name: str
    arguments: str | dict[str, Any] = ""


class TurnToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that an assistant's turn made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class OfferedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool: only functions are served."""

    type: str
    function: OfferedFunction | None = None


class ChatTurn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[TurnToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatBody(CommonBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatTurn]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
