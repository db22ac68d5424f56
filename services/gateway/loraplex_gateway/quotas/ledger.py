"""The arithmetic of a quota: GCRA for requests and tokens, reserved when a call is admitted and settled when it ends.

What is used is kept in requests and tokens, and drains at the limit's rate: the same as a theoretical arrival time, but what
was used under an old limit still counts when the limit changes. `script` does exactly this in Valkey.

Source: ATM Forum, "Traffic Management Specification" 4.0, 1996, section 4.4 and annex C (generic cell rate algorithm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loraplex_common.quotas_file import TenantQuota

NEVER: Final = math.inf
FIRST_OUTPUT_TOKENS: Final = 256.0
"""Output that a request of a tenant is expected to have before it is known."""
SMOOTHING: Final = 0.1
"""Weight of the newest request in the running mean of a tenant's outputs."""
TOLERANCE: Final = 1e-6
"""Part of a request or token: drained amounts are no whole numbers, and a call that waited as long as told must get in."""
MINUTE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call wants.

    Attributes:
        num_requests: Its choices.
        prompt_tokens: Prompt tokens of all of them.
        max_new_tokens: Most output tokens of all of them.
    """

    num_requests: int
    prompt_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an `Ask`: nothing is reserved unless all of it is.

    Attributes:
        reserved_tokens: What it costs until it is settled.
        requests_wait_s: Until enough requests are free; 0 if they are, `NEVER` if they never will be.
        tokens_wait_s: Until enough tokens are free.
        is_crowded: Whether more would be under way at once than may.
        used_requests: After it.
        used_tokens: After it.
        num_running: Requests of the tenant on all gateways known, the call included if it is admitted.
        at: When it was given, in the clock of the ledger.
    """

    reserved_tokens: int
    requests_wait_s: float
    tokens_wait_s: float
    is_crowded: bool
    used_requests: float
    used_tokens: float
    num_running: int
    at: float

    @property
    def is_admitted(self) -> bool:
        """Whether the call may go on."""
        return not (self.requests_wait_s or self.tokens_wait_s or self.is_crowded)


@dataclass(slots=True)
class Settlement:
    """What ended calls used, against what was reserved for them.

    Attributes:
        tokens: Used less reserved; negative gives back.
        output_tokens: Output tokens of the requests that had an output.
        num_outputs: How many those were.
    """

    tokens: float = 0.0
    output_tokens: int = 0
    num_outputs: int = 0

    def add(self, *, reserved: int, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request that has ended."""
        self.tokens += prompt_tokens + output_tokens - reserved
        if output_tokens:
            self.output_tokens += output_tokens
            self.num_outputs += 1

    def __bool__(self) -> bool:
        return bool(self.tokens or self.num_outputs)


@dataclass(slots=True)
class Ledger:
    """What one tenant has used.

    Attributes:
        at: When it was last brought up to date, in seconds of any clock.
        requests: Used, not yet drained.
        tokens: Used or reserved, not yet drained.
        mean_output: Running mean of the tokens of a request's output.
    """

    at: float
    requests: float = 0.0
    tokens: float = 0.0
    mean_output: float = FIRST_OUTPUT_TOKENS

    def advance(self, quota: TenantQuota, now: float) -> None:
        """Drain up to now."""
        elapsed_s = max(0.0, now - self.at)
        self.requests = _drained(self.requests, quota.requests_per_minute, elapsed_s)
        self.tokens = _drained(self.tokens, quota.tokens_per_minute, elapsed_s)
        self.at = now

    def settle(self, settlement: Settlement) -> None:
        """Replace reservations by what was used; the ledger is up to date."""
        self.tokens = max(0.0, self.tokens + settlement.tokens)
        if settlement.num_outputs:
            weight = 1.0 - (1.0 - SMOOTHING) ** settlement.num_outputs
            self.mean_output += weight * (settlement.output_tokens / settlement.num_outputs - self.mean_output)

    def cost(self, ask: Ask) -> int:
        """Return the tokens to reserve: the prompts, and the outputs as long as this tenant's are, or may be."""
        return ask.prompt_tokens + min(ask.max_new_tokens, ask.num_requests * math.ceil(self.mean_output))

    def admit(self, quota: TenantQuota, ask: Ask, num_running: int) -> Verdict:
        """Reserve what a call needs if all limits leave it; the ledger is up to date.

        Args:
            quota: The limits.
            ask: What is wanted.
            num_running: Requests of the tenant that are under way.
        """
        cost = self.cost(ask)
        requests_wait_s = _wait_s(self.requests, ask.num_requests, quota.requests_per_minute, quota.requests_burst)
        tokens_wait_s = _wait_s(self.tokens, cost, quota.tokens_per_minute, quota.tokens_burst)
        most = quota.max_concurrent_requests
        is_crowded = most is not None and num_running + ask.num_requests > most
        if not (requests_wait_s or tokens_wait_s or is_crowded):
            self.requests += ask.num_requests if quota.requests_per_minute is not None else 0
            self.tokens += cost if quota.tokens_per_minute is not None else 0
            num_running += ask.num_requests
        return Verdict(
            reserved_tokens=cost,
            requests_wait_s=requests_wait_s,
            tokens_wait_s=tokens_wait_s,
            is_crowded=is_crowded,
            used_requests=self.requests,
            used_tokens=self.tokens,
            num_running=num_running,
            at=self.at,
        )

    def requests_wait_s(self, quota: TenantQuota, num_requests: int) -> float:
        """Return how long so many requests must wait; 0 if they need not."""
        return _wait_s(self.requests, num_requests, quota.requests_per_minute, quota.requests_burst)

    def tokens_wait_s(self, quota: TenantQuota, num_tokens: int) -> float:
        """Return how long so many tokens must wait; 0 if they need not."""
        return _wait_s(self.tokens, num_tokens, quota.tokens_per_minute, quota.tokens_burst)


def _drained(used: float, per_minute: int | None, elapsed_s: float) -> float:
    return 0.0 if per_minute is None else max(0.0, used - elapsed_s * per_minute / MINUTE_S)


def _wait_s(used: float, cost: int, per_minute: int | None, burst: int | None) -> float:
    """Return the seconds until a cost fits. One above the burst waits until all is free, and leaves a debt."""
    if per_minute is None or burst is None:
        return 0.0
    if per_minute == 0:
        return NEVER
    excess = used + min(cost, burst) - burst
    return excess * MINUTE_S / per_minute if excess > TOLERANCE else 0.0
