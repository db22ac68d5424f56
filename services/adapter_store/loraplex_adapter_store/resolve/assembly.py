"""Builds what resolves sources that requests name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_adapter_store.repository.resolved import ResolvedRecords
from loraplex_adapter_store.resolve.policy import ResolvePolicy
from loraplex_adapter_store.resolve.resolver import Resolver
from loraplex_adapter_store.resolve.sweeper import ResolvedBudget, ResolvedSweeper

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from loraplex_adapter_store.core import Core
    from loraplex_adapter_store.imports.importer import Importer
    from loraplex_adapter_store.imports.sources import Sources
    from loraplex_adapter_store.lifecycle import Lifecycle

MAX_PAUSE_S: Final = 10.0


def make_resolver(
    core: Core, sources: Sources, importer: Importer, lifecycle: Lifecycle, stack: AsyncExitStack
) -> tuple[Resolver, ResolvedSweeper]:
    """Return what resolves, and what deletes adapters that it has made; the stack closes them."""
    config, records = core.config, ResolvedRecords(core.client)
    budget = ResolvedBudget(
        max_bytes=config.resolved_bytes,
        idle_s=config.resolved_idle_s,
        every_s=min(MAX_PAUSE_S, config.resolved_idle_s / 4),
    )
    sweeper = ResolvedSweeper(config.resolve_from, records, core.catalog, lifecycle, budget, core.metrics)
    policy = ResolvePolicy(
        rules=config.resolve_from,
        max_running=config.max_resolving,
        refusal_s=config.resolve_refusal_s,
        pin_s=config.resolve_pin_s,
    )
    resolver = Resolver(policy, sources, importer, core.catalog, records, core.metrics, sweeper.make_room)
    stack.push_async_callback(resolver.close)
    return resolver, sweeper
