"""Which gateways knew of a change when it was answered."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_adapter_store.records import AdapterRecord


@dataclass(frozen=True, slots=True)
class Visibility:
    """The gateways of all replicas, by the names of their watches.

    Attributes:
        gateways: Those that serve the change, sorted.
        late: Those that did not yet when the time was over, sorted.
        timeout_s: How long the answer would have waited at most.
    """

    gateways: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Changed:
    """A name after a change."""

    record: AdapterRecord
    visibility: Visibility
