"""Deletes adapters that were resolved at request time: unused ones, those beyond the budget, those that rules allow no more.

A request renews the time of its adapter's last use (its gateway does, about once a minute). What running requests lease is
never deleted here. A deleted adapter is resolved anew when a request names its source again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_sources import RESOLVED
from loraplex_common.auth import Principal, Role, acting_as
from loraplex_common.errors import AdapterForbiddenError, AdapterInUseError, AdapterNotFoundError
from loraplex_common.housekeeping import keep_doing
from loraplex_common.log import get_logger

from loraplex_adapter_store.lifecycle import Caller
from loraplex_adapter_store.resolve.rules import AskedSource, find_rule

if TYPE_CHECKING:
    from loraplex_common.errors import TenantQuotaError

    from loraplex_adapter_store.lifecycle import Lifecycle
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.repository.catalog import Catalog
    from loraplex_adapter_store.repository.resolved import ResolvedRecords
    from loraplex_adapter_store.resolve.rules import ResolveRule

PAGE: Final = 200
ITSELF: Final = Principal(name="adapter-store", role=Role.ADMIN)
"""The caller of these deletions, in the log."""

_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedBudget:
    """How much is kept.

    Attributes:
        max_bytes: Canonical bytes of all resolved adapters.
        idle_s: An adapter that no request has named for so long is deleted.
        every_s: Time between two looks. Replicas look beside each other: what one has deleted, another finds deleted.
    """

    max_bytes: int
    idle_s: float
    every_s: float


class ResolvedSweeper:
    """Looks for adapters to delete."""

    def __init__(
        self,
        rules: tuple[ResolveRule, ...],
        records: ResolvedRecords,
        catalog: Catalog,
        lifecycle: Lifecycle,
        budget: ResolvedBudget,
        metrics: StoreMetrics,
    ) -> None:
        self._rules = rules
        self._records = records
        self._catalog = catalog
        self._lifecycle = lifecycle
        self._budget = budget
        self._metrics = metrics
        self._is_checked = False

    async def run(self) -> None:
        """Look for ever."""
        await keep_doing(self._turn, name="deleting resolved adapters")

    async def _turn(self) -> None:
        if not self._is_checked:  # rules change with a restart alone
            await self._delete_forbidden()
            self._is_checked = True
        await self.sweep()
        await asyncio.sleep(self._budget.every_s)

    async def sweep(self) -> None:
        """Delete what is unused, then what is beyond the budget, least recently used first."""
        before_ms = (time.time() - self._budget.idle_s) * 1000
        while names := await self._records.unused(count=PAGE, before_ms=before_ms):
            for name in names:
                await self._delete(name, "idle")
        start = 0
        while (too_many := await self._records.num_bytes() - self._budget.max_bytes) > 0:
            names = await self._records.unused(start=start, count=PAGE)
            if not names:
                return
            start += await self._delete_some(names, too_many, "budget")

    async def make_room(self, tenant: str, num_bytes: int, refusal: TenantQuotaError) -> bool:
        """Delete a tenant's least recently used adapters for so many further bytes; return whether they fit then.

        Nothing is deleted for an adapter that would not fit even then.
        """
        sizes = await self._catalog.sizes_of(tenant)
        by_use = await self._records.by_use([name for name in sizes if name.startswith(RESOLVED)])
        excess = sum(sizes.values()) + num_bytes - refusal.exceeded[0].value
        if sum(sizes[name] for name in by_use) < excess:
            return False
        for name in by_use:
            if excess <= 0:
                break
            excess -= sizes[name] if await self._delete(name, "quota") else 0
        return excess <= 0

    async def _delete_some(self, names: list[str], num_bytes: int, cause: str) -> int:
        """Delete names in their order until so many bytes are free; return how many of them are left in use."""
        info, num_left = await self._records.info(names), 0
        for name in names:
            if num_bytes <= 0:
                break
            if await self._delete(name, cause):
                num_bytes -= info[name].num_bytes if name in info else 0
            else:
                num_left += 1
        return num_left

    async def _delete_forbidden(self) -> None:
        start = 0
        while names := await self._records.unused(start=start, count=PAGE):
            info = await self._records.info(names)
            allowed = {name for name, each in info.items() if self._allows(each.source, each.tenant)}
            start += len(allowed)
            for name in names:
                if name not in allowed and not await self._delete(name, "rule", force=True):
                    start += 1

    def _allows(self, source: str, tenant: str) -> bool:
        try:
            find_rule(self._rules, AskedSource.parse(source), tenant)
        except (AdapterForbiddenError, AdapterNotFoundError):
            return False
        return True

    async def _delete(self, name: str, cause: str, *, force: bool = False) -> bool:
        """Delete a name, or note its use if requests run with it; return whether it is gone."""
        try:
            with acting_as(ITSELF):
                await self._lifecycle.delete(name, "", Caller(ITSELF), force=force)
            self._metrics.resolved_deletions.labels(cause).inc()
        except AdapterInUseError:
            await self._records.touch(name)
            return False
        except AdapterNotFoundError:
            pass  # an administrator was faster
        await self._records.forget(name)
        return True
