"""One request inside the scheduler: its identity, its limits and its history so far.

These fields change on events only (arrival, admission, preemption, end); what changes with every token is in
`DecodeState`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.messages import Priority, Submission
from loraplex_engine.pages.block_keys import BlockKeys


class RequestState(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


TRANSITIONS: Final = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.ENDED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.ENDED}),  # WAITING: preempted
    RequestState.ENDED: frozenset[RequestState](),
}


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """A submission from its arrival to its one end.

    Attributes:
        number: Rises with arrival; unique.
        digests: Digests of the adapters that it adds up, in order; none for the base model.
        max_outputs: Output tokens, resumed ones included, at which the request ends with LENGTH.
        output_token_ids: int32; outputs known when it last had no slot: resumed ones, later those before preemption.
        slot: Row of the decode state while RUNNING, else -1.
        is_parked: WAITING for an adapter of it to change state, so admission does not look at it.
        parked_since_s: When it was parked last.
        misfit_since_s: Since when it has lacked only pages; None if it was not passed over yet.
        adapter_load_s: Time spent parked.
        admitted_s: When it first got a slot.
        first_token_s: When its first token came.
        num_prompt_logprobs: Prompt tokens whose probabilities were sent.
        num_prompt_logprobs_seen: Prompt tokens whose probabilities were computed since it last got a slot.
        num_cached: Tokens found in the prefix cache when it last got a slot.
        num_confirmed: Known tokens that are in the pool, by the results read since it last got a slot.
        is_suspect: Its last step failed; blocks which that step computed must not be shared.
        has_claim: It claims its adapters, all of them.
        block_keys: Names of its blocks, made at their first use.
        level: Its present class of service; rises as it waits.
        share: Index of its fairness key; -1 before it was queued.
        objective_s: Moment by which its first token must have come, or None.
        kv_page_s: Page-seconds of its sequence while it had a slot, counted when it loses the slot.
        adapter_page_s: Page-seconds of its adapters while it leased them, counted when it returns the leases.
    """

    submission: Submission
    number: int
    arrived_s: float
    max_outputs: int
    output_token_ids: NDArray[np.int32]
    state: RequestState = RequestState.WAITING
    slot: int = -1
    is_parked: bool = False
    parked_since_s: float = 0.0
    misfit_since_s: float | None = None
    adapter_load_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    num_prompt_logprobs: int = 0
    num_prompt_logprobs_seen: int = 0
    num_cached: int = 0
    num_confirmed: int = 0
    is_suspect: bool = False
    has_claim: bool = False
    block_keys: BlockKeys | None = None
    level: int = Priority.NORMAL
    share: int = -1
    objective_s: float | None = None
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0
    digests: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = tuple(term.digest for term in self.submission.adapters)

    @property
    def key(self) -> tuple[int, int]:
        """The session, and the number that the gateway gave the request in it."""
        return (self.submission.session_id, self.submission.session_slot)

    @property
    def adds_up(self) -> bool:
        """Tell whether it has several adapters."""
        return len(self.digests) > 1

    def applies_adapter_at(self, position: int) -> bool:
        """Tell whether its adapter, if it has one, applies to the token at a position."""
        start = self.submission.adapter_start
        return start is None or position >= start

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.submission.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and known output tokens: what a prefill computes."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def owes_prompt_logprobs(self) -> bool:
        """True while probabilities of its prompt's tokens are still to be computed."""
        asked = self.submission.sampling.prompt_logprobs >= 0
        return asked and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    @property
    def max_kv_tokens(self) -> int:
        """The most tokens the request ever has in the pool; the last output is never an input."""
        return self.num_prompt_tokens + self.max_outputs - 1

    def move_to(self, state: RequestState) -> None:
        """Change state.

        Raises:
            RuntimeError: If the move is not in `TRANSITIONS`.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.submission.request_id} cannot go from {self.state} to {state}")
        self.state = state


class RequestFaultError(Exception):
    """A fault of one request; its effects are undone, and the exception's cause says what it was.

    Attributes:
        request: The request at fault.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(f"request {request.submission.request_id}")
        self.request = request


def make_request(
    submission: Submission, *, number: int, now_s: float, max_model_len: int, ttft_slo_s: float | None = None
) -> Request:
    """Make a request of a submission; the submission and ``max_model_len`` limit its outputs."""
    arrived_s = submission.arrived_s or now_s
    moments = [submission.deadline_s, None if ttft_slo_s is None else arrived_s + ttft_slo_s]
    num_prompt = len(submission.prompt_token_ids)
    asked = submission.stopping.max_new_tokens
    room = max_model_len - num_prompt
    return Request(
        submission=submission,
        number=number,
        arrived_s=arrived_s,
        max_outputs=room if asked is None else min(asked, room),
        output_token_ids=np.asarray(submission.resumed_token_ids, dtype=np.int32),
        level=submission.priority,
        objective_s=min((moment for moment in moments if moment is not None), default=None),
    )
