"""What a generation yields: frozen values, free of wire types."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    """End-of-text, a stop token or a stop string."""
    LENGTH = "length"
    """``max_new_tokens`` or the longest sequence served."""
    TIME_LIMIT = "time_limit"
    """``time_limit_s``; the text is partial."""
    CANCELLED = "cancelled"
    """Ended by CancelRequest; the text is partial."""


class Tier(Enum):
    """Where an adapter's nearest copy lies, seen from the engine."""

    DEVICE = "device"
    ARENA = "arena"
    STORE = "store"
    CANONICAL = "canonical"
    ORIGIN = "origin"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token with its natural-log probability (after penalties and bias, before temperature)."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLogprobs:
    """Probabilities at one position: the token drawn, and the likeliest ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens counted; ``cached_tokens`` of the prompt came from a cached prefix."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the time went, in seconds; ``adapter_load_s`` is part of ``queue_s``."""

    queue_s: float
    adapter_load_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One message of a stream.

    Every event has ``text`` and ``token_ids``, so that a loop may print or collect them without asking for the type;
    they are empty for all but `Chunk`.

    Attributes:
        text: New text, whole characters only.
        token_ids: New token ids.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted(Event):
    """The gateway has the request (only with ``progress_events``)."""

    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued(Event):
    """The request waits (only with ``progress_events``).

    Attributes:
        position: Requests ahead of it.
        estimated_wait_s: Expected wait, in seconds.
    """

    position: int
    estimated_wait_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLoading(Event):
    """The adapter is on its way to the device (only with ``progress_events``)."""

    bytes_done: int
    bytes_total: int
    tier: Tier | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Started(Event):
    """An engine runs the request.

    Attributes:
        adapter_revision: Digest of the (first) adapter's weights in use; empty for the base model.
        adapter_revisions: Digests of all of ``adapters``, in their order; empty unless these were given.
        adapter_sources: Sources with their commits, of adapters that the request named so, in its order.
        numerics: What loading did to the base model's numbers on that engine, e.g. ``bf16``; empty: it does not say.
        seed: Seed in use, drawn by the gateway if none was given.
        prompt_logprobs: Probabilities of the prompt's tokens after the first, if asked for.
    """

    prompt_tokens: int
    cached_tokens: int
    engine_id: str
    adapter_revision: str
    resume_token: str
    seed: int
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    adapter_revisions: tuple[str, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    numerics: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk(Event):
    """New output.

    Attributes:
        sequence: Rises by one with each chunk of a stream.
        index: Position in the output of the first token.
        logprobs: Probabilities of the new tokens, if asked for.
    """

    sequence: int
    index: int
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished(Event):
    """The end of a stream.

    Attributes:
        stop_string: The stop string that matched, if one did.
        stop_token_id: The stop or end-of-text token that matched, if one did.
    """

    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    timings: Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The whole result of a request."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    started: Started
    finished: Finished
