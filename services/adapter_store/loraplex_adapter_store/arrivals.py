"""The ways in which adapters come in, as the servicer uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from loraplex_adapter_store.imports.intake import Intake
    from loraplex_adapter_store.push.pusher import Pusher
    from loraplex_adapter_store.resolve.resolver import Resolver


class Arrivals(NamedTuple):
    """Imports and uploads, pushes, and sources that requests name."""

    intake: Intake
    pusher: Pusher
    resolver: Resolver
