"""What a request and its events are inside the gateway; wire types stop at the servicers."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loraplex_common.structured_output import StructuredOutput

from loraplex_gateway.prompts import ChatMessage as ChatMessage
from loraplex_gateway.prompts import ChatPrompt as ChatPrompt
from loraplex_gateway.prompts import OutputParsing as OutputParsing
from loraplex_gateway.prompts import Prompt as Prompt
from loraplex_gateway.prompts import PromptText as PromptText
from loraplex_gateway.prompts import TextPrompt as TextPrompt
from loraplex_gateway.prompts import TokenPrompt as TokenPrompt
from loraplex_gateway.prompts import ToolCall as ToolCall
from loraplex_gateway.prompts import ToolMode as ToolMode
from loraplex_gateway.weighted import WeightedAdapter as WeightedAdapter


class FinishReason(enum.IntEnum):
    """Why an output ended; values equal `loraplex.v1.FinishReason`."""

    STOP = 1
    LENGTH = 2
    TIME_LIMIT = 3
    CANCELLED = 4


class Priority(enum.IntEnum):
    """Class of service; values equal `loraplex.v1.Priority`."""

    BATCH = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw tokens; `None` takes generation_config.json's value, then the engine's default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopping:
    """Where to stop."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseOptions:
    """What the chunks carry; logprobs counts are `None` for none at all.

    Attributes:
        prompt_text: Whether `Started` brings the prompt's text.
    """

    text: bool = True
    token_ids: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    prompt_text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """What a client has of a stream that broke.

    Attributes:
        token: From its `Started`.
        last_sequence: Sequence of its last chunk; counts for nothing without tokens.
        token_ids: Token ids of all its chunks.
        num_text_bytes: UTF-8 of all their text; None: what the tokens give.
    """

    token: str
    last_sequence: int
    token_ids: tuple[int, ...]
    num_text_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One request as the client put it.

    Attributes:
        request_id: Chosen by the client; empty if the gateway is to draw one. No two of a tenant run under one.
        trace_id: What the caller's logs call what this request is part of; not unique, only logged.
        model: Base model's name; empty where there is only one.
        adapter: ``name``, ``name:label`` or ``name@revision``; empty for the base model.
        adapters: Adapters whose effects are added up, instead of `adapter` and `adapter_scale`.
        priority: Class of service; None for the caller's usual one.
        queue_timeout_s: Longest wait for a place in a batch.
        time_limit_s: Longest time from admission; then the output is cut.
        fail_fast: Refuse with ADAPTER_LOADING rather than wait for the adapter.
        progress_events: Send Accepted, Queued and AdapterLoading.
        num_choices: Choices of the call, counted with the first of them; 0 for the others.
        is_resumable: Whether its stream is one that a client can resume.
        resume: The stream that it goes on with; None starts one.
        structured_output: What the output must look like; None for anything.
        truncate_prompt_tokens: Number of the prompt's last tokens to keep; -1 as many as have room; None for all.
        truncates_end: Keep the first tokens of a prompt that is truncated, not the last ones.
        parsing: How the output of a chat is taken apart; None leaves it as the model writes it.
    """

    prompt: Prompt | None
    request_id: str = ""
    model: str = ""
    adapter: str = ""
    adapters: tuple[WeightedAdapter, ...] = ()
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    options: ResponseOptions = ResponseOptions()
    priority: Priority | None = None
    queue_timeout_s: float | None = None
    time_limit_s: float | None = None
    cache_salt: str = ""
    affinity_key: str = ""
    fail_fast: bool = False
    progress_events: bool = False
    adapter_scale: float | None = None
    trace_id: str = ""
    traceparent: str = ""
    num_choices: int = 1
    is_resumable: bool = False
    resume: Resume | None = None
    structured_output: StructuredOutput | None = None
    truncate_prompt_tokens: int | None = None
    truncates_end: bool = False
    parsing: OutputParsing | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token with its natural-log probability.

    Attributes:
        text: The token's text on its own; bytes that are no UTF-8 are U+FFFD.
        data: The bytes it stands for.
    """

    token_id: int
    logprob: float
    text: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLogprobs:
    """The drawn token and the likeliest ones at one position, best first.

    Attributes:
        text_offset: Characters of the output's text before the token's own, or before the character it is part of.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The gateway has the request."""

    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits behind `position` others."""

    position: int
    estimated_wait_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLoading:
    """How far the adapter's way to the device has come; `tier` is a `loraplex.v1.Tier` value."""

    bytes_done: int
    bytes_total: int
    tier: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """An engine runs the request.

    Attributes:
        adapter_revisions: Revisions of `GenerationRequest.adapters`.
        adapter_sources: Pinned sources of the adapters that are named by their source.
        numerics: What loading did to the base model's numbers there.
        prompt_token_ids: The prompt's tokens.
        prompt_logprobs: For each of the prompt's tokens after the first, if they were asked for.
        prompt_text: If it was asked for.
        sampling: How tokens are drawn, the model's defaults filled in.
        make_parser: Returns a new `chat_output.deltas.ChatParser` for the text of the chunks; None: all of it is content.
        thought_end_id: The token that ends the thoughts of an output that begins with them; None if there is none.
    """

    prompt_tokens: int
    cached_tokens: int
    engine_id: str
    adapter_revision: str
    adapter_revisions: tuple[str, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    numerics: str = ""
    seed: int
    resume_token: str = ""
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    sampling: Sampling = Sampling()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_text: PromptText | None = None
    make_parser: Callable[[], Any] | None = None
    thought_end_id: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """New output; `index` is the position of its first token."""

    sequence: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the time went, in seconds; `adapter_load_s` is part of `queue_s`."""

    queue_s: float = 0.0
    adapter_load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of a stream."""

    finish_reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    usage: Usage
    timings: Timings


Event: TypeAlias = Accepted | Queued | AdapterLoading | Started | Chunk | Finished


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """Something that `model` or `adapter` can name.

    Attributes:
        revision: Digest; empty for a base model.
        labels: Label to digest, for an adapter.
        created: Unix time at which the revision was imported, or the base model's files were written.
        num_engines_resident: Engines on whose device it is.
    """

    name: str
    base_model: str
    revision: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    max_model_len: int
    created: int = 0
    num_engines_resident: int
