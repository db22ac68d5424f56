"""Adapters that requests name by their source: the store pins and imports them, requests wait, each until its own deadline.

What is known here of a source is the name of the tenant's adapter, for as long as the name table has it. A name that has not
been asked for for a while is asked for again beside the request that uses it: the store hears that it is used, and a source
without a commit gets its newer one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from google.rpc import status_pb2
from loraplex_common.adapter_sources import is_source
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterIncompatibleError,
    AdapterLoadingError,
    AdapterNotFoundError,
    AdapterUntrustedError,
    DeadlineError,
    InvalidParameterError,
    LoraplexError,
    NotSupportedError,
    SaturatedError,
    StoreUnavailableError,
)
from loraplex_common.ids import DEFAULT_LABEL
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_gateway.adapters.store_resolution import resolved_by_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from loraplex_common.auth import Principal
    from loraplex_common.peers import PeerChannel

    from loraplex_gateway.adapters.names import NameTable, ResolvedAdapter
    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.metrics.gateway import GatewayMetrics

HEARD_S: Final = 5.0
"""How long the name table may take to hear of an adapter that the store has made."""
PATIENCE_S: Final = 60.0
"""How long a call waits that only tokenises."""
REFRESH_S: Final = 60.0
"""How long what is known of a source is not asked for again."""
REFUSED_S: Final = 5.0
"""How long a refusal of the store is repeated without asking; the store remembers it longer."""
MAX_REFRESHING: Final = 32
"""Calls to the store at which no further one is made beside a request that has its adapter; a later request makes it."""
LOADING_RETRY_S: Final = 2.0
CROWDED_RETRY_S: Final = 1.0
MAX_KNOWN: Final = 16_384
MAX_REFUSED: Final = 4_096
FINAL: Final = (
    AdapterCorruptUploadError,
    AdapterForbiddenError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    AdapterUntrustedError,
    InvalidParameterError,
    NotSupportedError,
)

_log = get_logger()
_Key = tuple[str, str]
"""Tenant and source."""


@dataclass(slots=True)
class _Known:
    name: str
    source: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class _Refused:
    status: status_pb2.Status
    until: float


class SourceResolver:
    """Finds the adapters of sources.

    Args:
        channel: To the adapter store; None without one.
        names: The name table.
        max_waiting: Requests that may wait for a source at once; a tenant has half of them at most.
        count: Called with the outcome for each request.
        clock: Monotonic seconds of the event loop.
    """

    def __init__(
        self,
        channel: PeerChannel | None,
        names: NameTable,
        *,
        max_waiting: int,
        count: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._names = names
        self._max_waiting = max_waiting
        self._count = count
        self._clock = clock
        self._known: OrderedDict[_Key, _Known] = OrderedDict()
        self._refused: OrderedDict[_Key, _Refused] = OrderedDict()
        self._asking: dict[_Key, asyncio.Task[str]] = {}
        self._waiting: Counter[str] = Counter()

    @classmethod
    def over(
        cls, channel: PeerChannel | None, names: NameTable, config: GatewayConfig, metrics: GatewayMetrics
    ) -> SourceResolver:
        """Return the resolver of a gateway."""
        return cls(channel, names, max_waiting=config.max_resolving_requests, count=metrics.count_resolution)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a source."""
        return self._waiting.total()

    async def names_of(
        self,
        adapters: Mapping[str, str],
        *,
        caller: Principal,
        give_up_at: float | None = None,
        fail_fast: bool = False,
    ) -> Mapping[str, str]:
        """Return adapters with the names of the tenant's own in the place of sources.

        Args:
            adapters: Names and sources, by the field of the request that holds each.
            caller: The principal that asks.
            give_up_at: When the request's time is over; None for `PATIENCE_S` from now. The imports go on.
            fail_fast: Whether the request rather fails than waits for an import.

        Raises:
            AdapterLoadingError: If `fail_fast`, and an adapter is not there yet.
            DeadlineError: If the time is over.
            SaturatedError: If too many requests wait.
            LoraplexError: What the store refuses a source with, see its `Resolver.resolve`.
        """
        if not any(map(is_source, adapters.values())):
            return adapters
        found = dict(adapters)
        give_up_at = self._clock() + PATIENCE_S if give_up_at is None else give_up_at
        for field, text in adapters.items():
            if is_source(text):
                with self._counted(field):
                    found[field] = await self._name_of(text, caller, give_up_at, fail_fast=fail_fast)
        return found

    def marked(
        self, adapters: Mapping[str, str], resolved: tuple[ResolvedAdapter, ...], caller: Principal
    ) -> tuple[ResolvedAdapter, ...]:
        """Return adapters with the pinned sources of those that were named by their source.

        Args:
            adapters: As of `names_of`.
            resolved: The adapters, in this order.
            caller: The principal that asks.
        """
        pinned = [
            known.source if is_source(text) and (known := self._known.get((caller.name, text))) else ""
            for text in adapters.values()
        ]
        return tuple(
            replace(adapter, source=source) if source else adapter
            for adapter, source in zip(resolved, pinned, strict=True)
        )

    async def close(self) -> None:
        """Ask the store no more."""
        await cancel_and_wait(*self._asking.values())

    @contextmanager
    def _counted(self, field: str) -> Iterator[None]:
        """Count a failure in the block, and have it name the request's field in the place of the store's."""
        try:
            yield
        except InvalidParameterError as error:
            self._count(error.reason.lower())
            raise InvalidParameterError(error.message, field=field) from error
        except LoraplexError as error:
            self._count(error.reason.lower())
            raise

    async def _name_of(self, text: str, caller: Principal, give_up_at: float, *, fail_fast: bool) -> str:
        key = (caller.name, text)
        known = self._known.get(key)
        if known is not None and self._is_there(known.name, caller):
            self._known.move_to_end(key)
            if self._clock() - known.asked_at >= REFRESH_S and len(self._asking) < MAX_REFRESHING:
                known.asked_at = self._clock()
                self._ask(key, caller)
            self._count("known")
            return known.name
        self._check_refused(key)
        if fail_fast:
            self._check_room(caller.name)
            self._ask(key, caller)
            raise AdapterLoadingError(f"adapter {text!r} is being imported", retry_after_s=LOADING_RETRY_S)
        name = await self._wait(key, caller, give_up_at)
        self._count("resolved")
        return name

    def _is_there(self, name: str, caller: Principal) -> bool:
        entry = self._names.entry(name, caller)
        return entry is not None and DEFAULT_LABEL in entry.labels

    async def _wait(self, key: _Key, caller: Principal, give_up_at: float) -> str:
        tenant, text = key
        self._check_room(tenant)
        self._waiting[tenant] += 1
        try:
            async with asyncio.timeout_at(give_up_at):
                return await asyncio.shield(self._ask(key, caller))
        except TimeoutError:
            raise DeadlineError(
                f"adapter {text!r} was still being imported when the request's time was over; the import goes on: ask again"
            ) from None
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    def _check_room(self, tenant: str) -> None:
        most, most_of_tenant = self._max_waiting, max(1, self._max_waiting // 2)
        # Imports whose requests have gone count, too.
        asking = Counter(of for of, _ in self._asking)
        total, own = max(self._waiting.total(), asking.total()), max(self._waiting[tenant], asking[tenant])
        if total >= most or own >= most_of_tenant:
            raise SaturatedError(
                f"{total} requests wait for adapters that are being imported, {own} of them of tenant {tenant!r}; at most {most} "
                f"may, and {most_of_tenant} of one tenant (--max-resolving-requests)",
                retry_after_s=CROWDED_RETRY_S,
            )

    def _check_refused(self, key: _Key) -> None:
        refused = self._refused.get(key)
        if refused is None:
            return
        if refused.until <= self._clock():
            del self._refused[key]
            return
        raise from_status(refused.status)

    def _ask(self, key: _Key, caller: Principal) -> asyncio.Task[str]:
        """Have the store asked, unless it is being asked already."""
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._asked(key, caller), name=f"resolve {key[1]}")
            self._asking[key] = task
            task.add_done_callback(partial(self._ended, key))
        return task

    def _ended(self, key: _Key, task: asyncio.Task[str]) -> None:
        del self._asking[key]
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, FINAL):
            self._known.pop(key, None)  # it may be used no more
            self._refused[key] = _Refused(to_status(error), self._clock() + REFUSED_S)
            self._refused.move_to_end(key)
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        elif not isinstance(error, LoraplexError):
            _log.error("a source was not resolved", source=key[1], exc_info=error)

    async def _asked(self, key: _Key, caller: Principal) -> str:
        tenant, text = key
        answer = await resolved_by_store(self._channel, text, tenant)
        try:
            async with asyncio.timeout(HEARD_S):
                await self._names.wait_until(lambda: self._is_there(answer.name, caller))
        except TimeoutError:
            raise StoreUnavailableError(
                f"adapter {text!r} has been imported, and this gateway has not heard of it yet", retry_after_s=1.0
            ) from None
        self._known[key] = _Known(answer.name, answer.source, self._clock())
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return answer.name
