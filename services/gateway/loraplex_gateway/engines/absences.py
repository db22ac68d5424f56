"""Engines that should take requests and do not: each is expected, but not for ever."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loraplex_common.registry import EngineRecord


class Absences:
    """Since when engines have been away: registered and never reached, lost, silent, draining or gone from the registry.

    An engine that dies is mostly started again, under another id; nothing tells which new engine replaces which old one,
    so that each is expected for the same time from when it was away first.

    Args:
        wait_s: How long an engine is expected.
        clock: Monotonic seconds.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float]) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._since: dict[str, tuple[EngineRecord, float]] = {}

    def update(self, present: Mapping[str, bool], records: Mapping[str, EngineRecord]) -> None:
        """Take in which engines are there.

        Args:
            present: Engine id -> whether it takes requests.
            records: Engine id -> what is registered of it; of the same engines.
        """
        now = self._clock()
        for engine_id, is_there in present.items():
            if is_there:
                self._since.pop(engine_id, None)
            else:
                self._since.setdefault(engine_id, (records[engine_id], now))
        for engine_id, (_, since) in list(self._since.items()):
            if engine_id not in present and since + self._wait_s < now:
                del self._since[engine_id]

    def expected_until(self, is_wanted: Callable[[EngineRecord], bool]) -> float:
        """Return until when an engine like those that are wanted may come; minus infinity if none is away."""
        known = (since for record, since in self._since.values() if is_wanted(record))
        return max(known, default=-math.inf) + self._wait_s
