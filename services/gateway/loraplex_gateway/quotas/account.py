"""One tenant's account on one gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from loraplex_common.quotas_file import TenantQuota

from loraplex_gateway.quotas.ledger import Ask, Ledger, Settlement, Verdict


@dataclass(slots=True)
class Waiting:
    """A call and where its verdict goes."""

    ask: Ask
    verdict: asyncio.Future[Verdict]


@dataclass(slots=True)
class Account:
    """One tenant on this gateway.

    Attributes:
        quota: Its limits.
        ledger: As Valkey last had it, in this gateway's clock; on its own while Valkey is away.
        num_running: Its requests under way here.
        is_apart: Whether something was used that Valkey has not heard of.
        is_full: Whether no more requests might be under way when Valkey was last asked.
        settlement: What ended calls used that has not been said yet.
        waiting: Calls that have not been asked about yet.
    """

    tenant: str
    quota: TenantQuota
    ledger: Ledger
    num_running: int = 0
    is_apart: bool = False
    is_full: bool = False
    settlement: Settlement = field(default_factory=Settlement)
    waiting: list[Waiting] = field(default_factory=list)

    def take_settlement(self) -> Settlement:
        """Return what has not been said yet, once."""
        taken, self.settlement = self.settlement, Settlement()
        return taken

    def take_waiting(self) -> list[Waiting]:
        """Return the calls that wait for a verdict, once."""
        taken, self.waiting = self.waiting, []
        return taken


@dataclass(slots=True)
class Said:
    """One account's part of a turn."""

    account: Account
    settlement: Settlement
    waiting: list[Waiting]
