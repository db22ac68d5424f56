"""Which engines of a base model compute alike: those of equal numerics, as `loraplex_common.numerics` writes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from loraplex_common.log import get_logger
from loraplex_common.numerics import spoken

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.registry import EngineRecord

REMEDY = "start all engines of a base model alike, or the gateways with --allow-mixed-numerics"

_log = get_logger()


def prevailing(records: Iterable[EngineRecord]) -> dict[str, str]:
    """Return the numerics that most engines of each base model have, by fingerprint; of equally many the first in order.

    It depends on nothing but the registry, so that all gateways of a fleet agree. Engines that drain do not count: while a
    fleet is replaced by one of other numerics, requests move over once half of it has.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if not record.is_draining:
            counts[record.base_fingerprint][record.numerics] += 1
    return {base: min(found, key=lambda each: (-found[each], each)) for base, found in counts.items()}


class Alike:
    """Decides by numerics which engines a request may go to.

    Args:
        allows_mixed: Whether the operator lets a request go to engines of any numerics.
    """

    def __init__(self, *, allows_mixed: bool = False) -> None:
        self._allows_mixed = allows_mixed
        self._prevailing: dict[str, str] = {}
        self._passed_over: dict[str, str] = {}

    def update(self, records: Iterable[EngineRecord]) -> None:
        """Take in which engines are registered; say of each once that it is passed over, and why."""
        known = list(records)
        self._prevailing = prevailing(known)
        reasons = {record.engine_id: reason for record in known if (reason := self.reason(record))}
        for engine_id, reason in reasons.items():
            if self._passed_over.get(engine_id) != reason:
                _log.warning("an engine gets no new requests", engine_id=engine_id, cause=reason, remedy=REMEDY)
        self._passed_over = reasons

    def reason(self, record: EngineRecord) -> str:
        """Return why an engine gets no new requests; empty if it may."""
        served = self._prevailing.get(record.base_fingerprint, record.numerics)
        if self._allows_mixed or record.numerics == served:
            return ""
        return f"its numerics are {spoken(record.numerics)}, those of most engines of its base model {spoken(served)}"

    def may_serve(self, record: EngineRecord, begun: str | None) -> bool:
        """Tell whether an engine may have a request.

        Args:
            record: The engine.
            begun: Numerics of the engine that the request began on; None for a new request.
        """
        if self._allows_mixed:
            return True
        return not self.reason(record) if begun is None else record.numerics == begun
