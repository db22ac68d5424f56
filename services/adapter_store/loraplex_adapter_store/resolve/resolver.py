"""Turns a source that a request names into an adapter of the request's tenant: pinned, and imported once.

A call waits for a task that it shares with all calls for the same tenant and source on this replica. A caller that gives up
does not end it, so that the import is there when it asks again. Over replicas, and over tenants, a lease in Valkey lets one
import at a time fetch a source; the others find its revision, or the reason why there is none.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_sources import resolved_name
from loraplex_common.answer_by import answering_within
from loraplex_common.errors import LoraplexError, SaturatedError, StoreUnavailableError, TenantQuotaError
from loraplex_common.log import get_logger
from loraplex_common.tasks import cancel_and_wait

from loraplex_adapter_store.imports.importer import Progress
from loraplex_adapter_store.imports.targets import ImportOutcome, ImportTarget, Written
from loraplex_adapter_store.repository.resolved import PINNED_TTL_S, ResolvedInfo
from loraplex_adapter_store.resolve.refusals import PASSING, Refusals
from loraplex_adapter_store.resolve.rules import AskedSource, find_rule

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from loraplex_adapter_store.imports.importer import Importer
    from loraplex_adapter_store.imports.sources import Sources
    from loraplex_adapter_store.metrics import StoreMetrics
    from loraplex_adapter_store.repository.catalog import Catalog
    from loraplex_adapter_store.repository.resolved import ResolvedRecords
    from loraplex_adapter_store.resolve.policy import ResolvePolicy
    from loraplex_adapter_store.resolve.rules import ResolveRule

FOLDER_TTL_S: Final = 600.0
"""How long a folder of object storage is taken for what it was, for a further tenant."""
CROWDED_RETRY_S: Final = 2.0
_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """An adapter of a tenant.

    Attributes:
        name: Its name in the store.
        source: Its pinned source.
        revision: Its weights.
        is_new: Whether this resolution has made the name.
    """

    name: str
    source: str
    revision: str
    is_new: bool


class Resolver:
    """Resolves sources.

    Args:
        policy: What may be resolved.
        sources: Finds out how a source is fetched.
        importer: Imports.
        catalog: Names.
        records: What replicas know of sources.
        metrics: Where outcomes are counted.
        make_room: Deletes adapters that were resolved for a tenant; see `ImportTarget.make_room`.
    """

    def __init__(
        self,
        policy: ResolvePolicy,
        sources: Sources,
        importer: Importer,
        catalog: Catalog,
        records: ResolvedRecords,
        metrics: StoreMetrics,
        make_room: Callable[[str, int, TenantQuotaError], Awaitable[bool]],
    ) -> None:
        self._policy = policy
        self._sources = sources
        self._importer = importer
        self._catalog = catalog
        self._records = records
        self._metrics = metrics
        self._make_room = make_room
        self._refusals = Refusals(records, policy.refusal_s)
        self._running: dict[tuple[str, str], asyncio.Task[Resolved]] = {}

    @property
    def num_running(self) -> int:
        """Sources that are being resolved."""
        return len(self._running)

    async def resolve(self, text: str, tenant: str) -> Resolved:
        """Return the adapter that a source is for a tenant; import it if there is none yet.

        Args:
            text: The source, as `AskedSource.parse` takes it.
            tenant: The tenant of the request.

        Raises:
            InvalidParameterError: If the source is malformed.
            AdapterForbiddenError: If the tenant may not name it, or the source refuses the operator's credential.
            AdapterNotFoundError: If there is no such source, or this store resolves none.
            AdapterIncompatibleError: If it is no adapter that can be served; and the other refusals of imports.
            TenantQuotaError: If the tenant has no import or no bytes left.
            SaturatedError: If too many sources are being resolved.
        """
        try:
            resolved = await self._shared(text, tenant)
        except LoraplexError as error:
            self._metrics.resolutions.labels(error.reason.lower()).inc()
            raise
        self._metrics.resolutions.labels("new" if resolved.is_new else "known").inc()
        return resolved

    async def _shared(self, text: str, tenant: str) -> Resolved:
        source = AskedSource.parse(text)
        rule = find_rule(self._policy.rules, source, tenant)
        if (known := await self._at_hand(rule, source, tenant)) is not None:
            return known
        key = (tenant, source.text)
        task = self._running.get(key)
        if task is None:
            self._check_room(tenant)
            with answering_within(None):  # it goes on after this call
                task = asyncio.create_task(self._resolve(rule, source, tenant), name=f"resolve {source.text}")
            self._running[key] = task
            task.add_done_callback(partial(self._ended, key))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel what is being resolved."""
        await cancel_and_wait(*self._running.values())

    def _check_room(self, tenant: str) -> None:
        running = Counter(tenant for tenant, _ in self._running)
        most, most_of_tenant = self._policy.max_running, self._policy.max_running_of_tenant
        if running.total() >= most:
            raise SaturatedError(
                f"{running.total()} sources are being resolved already, at most {most} at once (--max-resolving)",
                retry_after_s=CROWDED_RETRY_S,
            )
        if running[tenant] >= most_of_tenant:
            raise SaturatedError(
                f"{running[tenant]} sources of tenant {tenant!r} are being resolved already, at most {most_of_tenant} at once "
                "(half of --max-resolving)",
                retry_after_s=CROWDED_RETRY_S,
            )

    def _ended(self, key: tuple[str, str], task: asyncio.Task[Resolved]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # every call that waited for it may be gone

    async def _at_hand(self, rule: ResolveRule, source: AskedSource, tenant: str) -> Resolved | None:
        """Return an adapter for which nothing is to be fetched or asked; it takes no place from those that are resolved."""
        if source.hub is not None and not source.is_pinned:
            if (commit := await self._records.pin(source_key(rule, source))) is None:
                return None
            source = AskedSource.of(replace(source.hub, revision=commit))
        return await self._known(_name(rule, source, tenant), source, tenant)

    async def _resolve(self, rule: ResolveRule, source: AskedSource, tenant: str) -> Resolved:
        pinned = await self._pinned(rule, source)
        name = _name(rule, pinned, tenant)
        if (known := await self._known(name, pinned, tenant)) is not None:
            return known
        key = source_key(rule, pinned)
        await self._refusals.check(key)
        async with self._records.lease(key):
            # What the holder of the lease before has found: another spelling of the source may be the same adapter.
            if (known := await self._known(name, pinned, tenant)) is not None:
                return known
            await self._refusals.check(key)
            try:
                return await self._import(rule, pinned, tenant, name)
            except LoraplexError as error:
                await self._refusals.remember(key, error)
                raise

    async def _pinned(self, rule: ResolveRule, source: AskedSource) -> AskedSource:
        """Return a source at a commit: at the last one while the hub cannot be asked."""
        if source.hub is None or source.is_pinned:
            return source
        key = source_key(rule, source)
        if (commit := await self._records.pin(key)) is not None:
            return AskedSource.of(replace(source.hub, revision=commit))
        await self._refusals.check(key)
        async with self._records.lease(key):
            if (commit := await self._records.pin(key)) is not None:
                return AskedSource.of(replace(source.hub, revision=commit))
            await self._refusals.check(key)
            try:
                hub = await self._sources.pin(source.hub, rule.credential)
            except LoraplexError as error:
                if isinstance(error, PASSING) and (last := await self._records.pin(_last(key))) is not None:
                    _log.warning("a source stays at its last commit", source=source.text, error=error.message)
                    return AskedSource.of(replace(source.hub, revision=last))
                await self._refusals.remember(key, error)
                raise
            await self._records.set_pin(key, hub.revision, self._policy.pin_s)
            await self._records.set_pin(_last(key), hub.revision, PINNED_TTL_S)
            return AskedSource.of(hub)

    async def _known(self, name: str, pinned: AskedSource, tenant: str) -> Resolved | None:
        """Return an adapter that the tenant has; None if it has none."""
        record = await self._catalog.get(name)
        if record is None or record.is_deleted or not record.is_visible_to(tenant, is_admin=False):
            return None
        digest = record.labels.get("latest")
        if digest is None or not await self._records.touch(name):
            return None
        return Resolved(name=name, source=pinned.text, revision=digest, is_new=False)

    async def _import(self, rule: ResolveRule, pinned: AskedSource, tenant: str, name: str) -> Resolved:
        # What was imported without a look at its signature is none that may be taken once signatures count.
        key = source_key(rule, pinned) + (":signed" if self._sources.wants_signature(pinned.text) else "")
        target = ImportTarget(
            name=name,
            base_model=rule.base,
            kind="resolve",
            tenants=(tenant,),
            description=f"resolved from {pinned.text}",
            make_room=partial(self._make_room, tenant),
        )
        outcome = await self._adopt(key, target)
        if outcome is None:
            identity, fetch = self._sources.fetcher(pinned.hub or pinned.text, rule.credential)
            outcome = await self._importer.import_from(identity, fetch, target, Progress(name))
        revision = outcome.revision
        await self._records.set_digest(key, revision.revision, FOLDER_TTL_S if pinned.is_folder else PINNED_TTL_S)
        info = ResolvedInfo(tenant=tenant, source=pinned.text, num_bytes=revision.canonical_bytes)
        await self._records.note(name, info)
        return Resolved(name=name, source=pinned.text, revision=revision.revision, is_new=True)

    async def _adopt(self, key: str, target: ImportTarget) -> ImportOutcome | None:
        """Give a name the revision that its source is known to be; None if the store has it not, or no more."""
        if (digest := await self._records.digest(key)) is None:
            return None
        if not (known := await self._catalog.get_revisions([digest])):
            return None
        try:
            async with self._importer.counted(target):
                written, size = Written(known[0], already_existed=True), known[0].canonical_bytes
                try:
                    return await self._importer.commit(written, target)
                except TenantQuotaError as error:
                    if target.make_room is None or not await target.make_room(size, error):
                        raise
                    return await self._importer.commit(written, target)
        except StoreUnavailableError:
            return None  # collected just now, or Valkey is away, which the import meets too


def _name(rule: ResolveRule, pinned: AskedSource, tenant: str) -> str:
    return resolved_name(tenant, f"{rule.base}\0{pinned.text}")


def source_key(rule: ResolveRule, source: AskedSource) -> str:
    """Return what pins, revisions and refusals of a source are remembered by: what one credential sees, another may not."""
    return resolved_name(f"{rule.credential}\0{rule.base}", source.text).rpartition("/")[2]


def _last(key: str) -> str:
    return f"{key}:last"
