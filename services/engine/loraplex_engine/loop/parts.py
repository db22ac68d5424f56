"""What the step loop drives."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.loop.arena_grants import ArenaGrants
from loraplex_engine.loop.load_report import LoadReport
from loraplex_engine.loop.step_times import StepTimes
from loraplex_engine.scheduler.scheduler import Scheduler
from loraplex_engine.step import ModelRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopParts:
    """What the loop drives; all of it belongs to the loop's thread once it runs, the arena's allocator excepted."""

    scheduler: Scheduler
    cache: AdapterCache
    grants: ArenaGrants
    arena: HostArena
    runner: ModelRunner
    report: LoadReport
    times: StepTimes
