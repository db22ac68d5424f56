"""What crosses between the step loop's thread and the asyncio side: commands go in, events come out.

Domain types only, converted from and to the wire by `rpc`. Commands are posted to the loop's one inbox; events leave through
one outbox per session and one for the store client.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from loraplex_common.adapter_image import AdapterSpec
from loraplex_common.errors import LoraplexError
from loraplex_common.structured_output import StructuredOutput
from numpy.typing import NDArray

from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.sampling_params import AddedTokenId, SamplingParams, StoppingParams
from loraplex_engine.step import TokenLogprobs


class Priority(enum.IntEnum):
    """Class of service; requests of a higher class go first."""

    BATCH = 1
    NORMAL = 2
    HIGH = 3


class FinishReason(enum.Enum):
    """Why an output ended normally."""

    STOP = "stop"
    LENGTH = "length"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One of the adapters that a request adds up, and the request's own factor on it."""

    digest: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One request as a gateway submitted it.

    Attributes:
        session_id: The session whose outbox gets the outputs.
        session_slot: The gateway's number for the request, unique among its running requests.
        prompt_token_ids: int32 ``[num_prompt_tokens]``, not empty, each below the vocabulary size or added by the adapter.
        resumed_token_ids: int32; output tokens drawn elsewhere before, continued here.
        adapter_digest: Digest of the adapter; None for the base model.
        more_adapters: Adapters that are added to ``adapter_digest``, in this order; no digest comes twice.
        adapter_start: First token of the prompt that the adapter applies to; None if it is none that a sequence activates.
        deadline_s: ``time.monotonic()`` after which no client waits for the answer, or None.
        queue_deadline_s: ``time.monotonic()`` by which it must have a place in a batch, or None.
        time_limit_at_s: ``time.monotonic()`` at which the output is cut with TIME_LIMIT, or None.
        traceparent: W3C trace context that further spans of the request belong to; empty without.
        added_token_ids: The largest id of each field that has ids which only an adapter can add.
        structured_output: What the output must look like; None: anything.
        bad_token_sequences: Sequences of token ids of which the last cannot be drawn after the others.
        rules: Both, as the output goes on under them, resumed tokens taken in; the step loop's once submitted. None: neither.
    """

    session_id: int
    session_slot: int
    request_id: str
    prompt_token_ids: NDArray[np.int32]
    resumed_token_ids: NDArray[np.int32]
    sampling: SamplingParams
    stopping: StoppingParams
    adapter_digest: str | None = None
    adapter_scale: float = 1.0
    more_adapters: tuple[AdapterTerm, ...] = ()
    adapter_start: int | None = None
    deadline_s: float | None = None
    queue_deadline_s: float | None = None
    time_limit_at_s: float | None = None
    fairness_key: str = ""
    priority: Priority = Priority.NORMAL
    cache_salt: str = ""
    fail_fast: bool = False
    arrived_s: float = 0.0
    traceparent: str = ""
    added_token_ids: tuple[AddedTokenId, ...] = ()
    structured_output: StructuredOutput | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    rules: OutputRules | None = None

    @property
    def adapters(self) -> tuple[AdapterTerm, ...]:
        """All adapters that it adds up, the first one first; none for the base model."""
        if self.adapter_digest is None:
            return ()
        return (AdapterTerm(self.adapter_digest, self.adapter_scale), *self.more_adapters)


# --- commands: asyncio side -> step loop ---


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a request. Every submission ends in exactly one `Ended`, whatever happens."""

    submission: Submission


@dataclass(frozen=True, slots=True)
class Abort:
    """End one request; its `Ended` has FinishReason.CANCELLED."""

    session_id: int
    session_slot: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End all requests of a session whose peer is gone; no more outputs go to its outbox."""

    session_id: int


@dataclass(frozen=True, slots=True)
class ImageArrived:
    """A verified image is in the arena slots that were granted for it."""

    spec: AdapterSpec
    arena_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """The store cannot supply an image; requests that wait for it end with the error."""

    digest: str
    error: LoraplexError


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """An adapter will not be wanted any more: drain it from the device and the arena."""

    digest: str


@dataclass(frozen=True, slots=True)
class Call:
    """Run a function on the loop's thread between two steps and put its result into the future."""

    function: Callable[[], object]
    future: Future[object]


Command = Submit | Abort | CloseSession | ImageArrived | ImageRefused | DropAdapter | Call


# --- events: step loop -> sessions ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A request got its place in a batch."""

    session_slot: int
    cached_tokens: int
    queue_s: float
    adapter_load_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """A request waits for its adapters.

    Attributes:
        state: State of the adapter; of several, the state of the one that has come least far.
        bytes_done: Bytes in the arena, of all its adapters together; so is ``bytes_total``, as far as sizes are known.
    """

    session_slot: int
    state: ResidencyState
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWithLogprobs:
    """A token of a request that asked for probabilities."""

    session_slot: int
    position: int
    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprobs:
    """Probabilities of prompt tokens ``[first, first + len(entries))``; sent before the first token."""

    session_slot: int
    first: int
    entries: list[TokenLogprobs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The one terminal event of a request: `error` or a finish reason.

    Attributes:
        stop_token_id: The stop token that was drawn, for FinishReason.STOP; it is the output's last token.
        queue_s: Time until the request got a place in a batch, ``adapter_load_s``, the wait for the adapter, included.
        kv_page_s: Page-seconds that its sequence held pages of the pool; a page's seconds are shared equally by the
            sequences that hold it.
        adapter_page_s: Page-seconds of its adapters while it ran, shared equally by the requests that used them.
    """

    session_slot: int
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: LoraplexError | None = None
    queue_s: float = 0.0
    adapter_load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0


SessionEvent = Started | Loading | TokenWithLogprobs | PromptLogprobs | Ended


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutputs:
    """The outputs of one step for one session.

    Attributes:
        token_slots: Session slots of plain tokens; with ``token_positions`` and ``token_ids`` in parallel, int32.
        events: All other outputs, in order. `Started`, `Loading` and `PromptLogprobs` come before the plain tokens of
            the same slot, `TokenWithLogprobs` and `Ended` after them.
    """

    step_id: int
    token_slots: NDArray[np.int32]
    token_positions: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    events: list[SessionEvent]


# --- events: step loop -> store client ---


class ResidencyState(enum.Enum):
    """State of an adapter on this engine; `adapters.adapter.TRANSITIONS` has the allowed moves."""

    ABSENT = "absent"
    WANTED = "wanted"
    IN_ARENA = "in_arena"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class WantImage:
    """An image is needed from the store; ``traceparent`` is that of the request which needs it."""

    digest: str
    deadline_s: float | None
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidencyChanged:
    """An adapter's state has changed; the sequence rises by one with each event."""

    sequence: int
    digest: str
    state: ResidencyState
    generation: int
    num_leases: int
    num_pages: int
    is_pinned: bool
    max_rank: int


StoreEvent = WantImage | ResidencyChanged
