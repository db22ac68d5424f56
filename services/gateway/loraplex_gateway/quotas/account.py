"""One tenant's account on one gateway."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Final

from loraplex_common.quotas_file import TenantQuota

from loraplex_gateway.quotas.ledger import Ask, Ledger, Settlement, Verdict

FAR: Final = 0.5
"""Share of a limit below which a call is admitted without asking Valkey first."""
LENT: Final = 1 / 32
"""Share of a limit that a gateway gives in this way before Valkey has answered: the most by which it can be ahead."""
FRESH_S: Final = 0.1
"""How old what Valkey said may be for that."""


@dataclass(slots=True)
class Waiting:
    """A call and where its verdict goes."""

    ask: Ask
    verdict: asyncio.Future[Verdict]


@dataclass(slots=True)
class Lent:
    """What calls were given at once that Valkey has not heard of yet; `Account.ledger` has it."""

    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Account:
    """One tenant on this gateway.

    Attributes:
        quota: Its limits.
        ledger: As Valkey last had it, in this gateway's clock; on its own while Valkey is away.
        num_running: Its requests under way here.
        num_elsewhere: Its requests under way on other gateways when Valkey was last asked.
        heard_at: When Valkey was last asked, in this gateway's clock.
        is_apart: Whether something was used that Valkey has not heard of.
        is_full: Whether no more requests might be under way when Valkey was last told or asked.
        lent: What was given at once and has not been said yet.
        saying: What was given at once and is being said: Valkey may not have heard of it either.
        settlement: What ended calls used that has not been said yet.
        waiting: Calls that have not been asked about yet.
    """

    tenant: str
    quota: TenantQuota
    ledger: Ledger
    num_running: int = 0
    num_elsewhere: int = 0
    heard_at: float = -math.inf
    is_apart: bool = False
    is_full: bool = False
    lent: Lent = field(default_factory=Lent)
    saying: Lent = field(default_factory=Lent)
    settlement: Settlement = field(default_factory=Settlement)
    waiting: list[Waiting] = field(default_factory=list)

    def lend(self, ask: Ask, now: float) -> Verdict | None:
        """Return the verdict on a call that no other gateway can make a refusal; None if Valkey must be asked.

        So it is as long as the tenant has used less than `FAR` of each limit, and what Valkey has not heard of is small.
        """
        quota, ledger, num_running = self.quota, self.ledger, self.num_running + self.num_elsewhere
        if now - self.heard_at > FRESH_S:
            return None
        ledger.advance(quota, now)
        cost, wanted = ledger.cost(ask), ask.num_requests
        unheard_requests = self.lent.requests + self.saying.requests + wanted
        limits = (
            (quota.requests_burst, ledger.requests + wanted, unheard_requests),
            (quota.tokens_burst, ledger.tokens + cost, self.lent.tokens + self.saying.tokens + cost),
            (quota.max_concurrent_requests, num_running + wanted, unheard_requests),
        )
        if any(limit is not None and (used > FAR * limit or lent > LENT * limit) for limit, used, lent in limits):
            return None
        verdict = ledger.admit(quota, ask, num_running)
        if not verdict.is_admitted:  # a rate of 0
            return None
        self.lent.requests += wanted
        self.lent.tokens += cost
        return verdict

    def hear(self, ledger: Ledger, num_elsewhere: int, asked_at: float) -> None:
        """Take over what Valkey has, and what it has not heard of yet."""
        self.ledger, self.num_elsewhere, self.is_apart = ledger, num_elsewhere, False
        self.saying = Lent()
        most = self.quota.max_concurrent_requests
        self.is_full = most is not None and self.num_running + num_elsewhere >= most
        # It is at least this old, so what is read from it errs towards what the tenant has used.
        ledger.at = self.heard_at = asked_at
        ledger.requests += self.lent.requests
        ledger.tokens += self.lent.tokens

    def admit_alone(self, ask: Ask, now: float) -> Verdict:
        """Return the verdict on a call while Valkey does not answer."""
        self.is_apart = True
        self.ledger.advance(self.quota, now)
        return self.ledger.admit(self.quota, ask, self.num_running)

    def settle_alone(self, settlement: Settlement, now: float) -> None:
        """Settle what ended calls used while Valkey does not answer."""
        self.is_apart = True
        self.ledger.advance(self.quota, now)
        self.ledger.settle(settlement)

    def take_lent(self) -> Lent:
        """Return what has been given at once and not been said yet, once."""
        self.saying, self.lent = self.lent, Lent()
        return self.saying

    def take_settlement(self) -> Settlement:
        """Return what has not been said yet, once."""
        taken, self.settlement = self.settlement, Settlement()
        return taken

    def take_waiting(self) -> list[Waiting]:
        """Return the calls that wait for a verdict, once; one that has been given up is not asked about."""
        taken, self.waiting = self.waiting, []
        return [each for each in taken if not each.verdict.cancelled()]


@dataclass(slots=True)
class Said:
    """One account's part of a turn."""

    account: Account
    lent: Lent
    settlement: Settlement
    waiting: list[Waiting]
