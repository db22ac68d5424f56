"""One soak: the fleet is started, asked while undisturbed, disturbed, and ended."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from support.backend import served_base
from support.base_models import TinyBase, write_base_model
from support.soak.abuse import Abuse
from support.soak.book import Book
from support.soak.catalogue import Catalogue
from support.soak.clients import CLIENTS_RESUME, Asker
from support.soak.director import Director
from support.soak.faults import Faults
from support.soak.fleet import Fleet
from support.soak.memory import MemoryWatch
from support.soak.report import Report, fill
from support.soak.truth import Truth

if TYPE_CHECKING:
    from pathlib import Path

NUM_ASKERS: Final = 8


@dataclass(frozen=True)
class Plan:
    """Length and seed of a soak; ``commit`` is for the report."""

    minutes: float
    seed: int
    commit: str = ""


async def soak(directory: Path, plan: Plan) -> Report:
    """Run a fleet under faults.

    Args:
        directory: Empty; gets models, data and logs.
        plan: Length and seed.
    """
    model = write_base_model(directory / "tiny", served_base(TinyBase(max_position_embeddings=1024)))
    truth = Truth(directory / "adapters")
    truth.import_root.mkdir()
    truth.write(model)
    fleet = Fleet(directory, model, truth.import_root)
    try:
        await fleet.start()
        await truth.learn(fleet)
        report = await _disturbed(fleet, truth, plan)
        troubles = await fleet.close()
    except BaseException:
        fleet.kill()
        raise
    report.errors += troubles
    report.num_errors += len(troubles)
    return report


async def _disturbed(fleet: Fleet, truth: Truth, plan: Plan) -> Report:
    book = Book()

    def rng(whose: str) -> random.Random:
        return random.Random(f"{plan.seed} {whose}")

    catalogue = Catalogue(fleet, truth, book, rng("catalogue"))
    askers = [Asker(fleet, truth, catalogue, book, rng(f"asker {number}")) for number in range(NUM_ASKERS)]
    watch = MemoryWatch(fleet)
    director = Director(
        fleet, Faults(fleet, book, rng("faults")), Abuse(fleet, truth, book, rng("abuse")), book, rng("director")
    )
    over, began_s = asyncio.Event(), time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for run in (*(asker.run for asker in askers), catalogue.run, watch.run):
            tasks.create_task(run(over))
        await director.run(60 * plan.minutes)
        over.set()
    watch.write(fleet.directory / "memory.json")
    minutes = round((time.monotonic() - began_s) / 60, 2)
    report = Report(plan.seed, plan.commit, minutes, clients_resume=CLIENTS_RESUME)
    report.longest_lag_s = round(catalogue.longest_lag_s, 2)
    return fill(report, book, watch.slopes())
