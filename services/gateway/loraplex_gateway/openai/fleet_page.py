"""What the page at /ui is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_common.peers import PeerChannel

from loraplex_gateway.fleet.watch import FleetWatch

if TYPE_CHECKING:
    from loraplex_gateway.config import GatewayConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetPage:
    """What the page is about.

    Attributes:
        fleet: Tells of the engines' page pools.
        store: Tells of imports; None without an adapter store.
        gateway_id: This process.
    """

    fleet: FleetWatch
    store: PeerChannel | None
    gateway_id: str

    @classmethod
    def of(
        cls, config: GatewayConfig, fleet: FleetWatch, store: PeerChannel | None, gateway_id: str
    ) -> FleetPage | None:
        """Return what the configuration wants; None where the page is off."""
        return cls(fleet=fleet, store=store, gateway_id=gateway_id) if config.ui else None
