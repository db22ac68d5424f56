"""What a store resolves, and how much at once."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_adapter_store.resolve.rules import ResolveRule


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvePolicy:
    """What may be resolved, and how much at once.

    Attributes:
        rules: What may be resolved; none turns resolution off.
        max_running: Sources that are being pinned and imported at once on this replica; a tenant has half of them at most.
        refusal_s: How long a refusal is remembered.
        pin_s: How long a source without a commit stays at the one that it had when it was looked up.
    """

    rules: tuple[ResolveRule, ...]
    max_running: int
    refusal_s: float
    pin_s: float

    @property
    def max_running_of_tenant(self) -> int:
        """Sources of one tenant at once."""
        return max(1, self.max_running // 2)
