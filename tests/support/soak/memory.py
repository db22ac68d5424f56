"""The resident memory and descriptors of processes over their lives, and the slopes of both."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from support.soak.abuse import NUM_IDLE

if TYPE_CHECKING:
    from support.soak.fleet import Fleet

SAMPLE_S: Final = 1.0
WARM_UP_S: Final = 60.0
MIN_LIFE_S: Final = 60.0  # after the warm-up; a shorter life has no meaningful slope
MAX_SLOPE_MIB_PER_MIN: Final = 0.5
# Total growth below which a slope means nothing. A process that has seen each kind of request once keeps the memory
# that the largest took; if it is watched for longer than a few rounds of faults, it has seen all of them early.
SHORT_MIN: Final = 8.0
NOISE_SHORT_MIB: Final = 160.0
NOISE_MIB: Final = 4.0
NOISE_DESCRIPTORS: Final = 24.0
NOISE_SHORT_DESCRIPTORS: Final = (
    2.0 * NUM_IDLE
)  # idle connections of both faces in the end of a short window tilt its slope
_PAGE_MIB: Final = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Slope:
    """How one process grew after its warm-up, by least squares.

    Attributes:
        minutes: How long it was watched.
        last_mib: Resident memory at the end.
    """

    name: str
    minutes: float
    mib_per_min: float
    descriptors_per_min: float
    last_mib: float
    last_descriptors: int

    @property
    def is_flat(self) -> bool:
        """Whether it leaks neither memory nor descriptors."""
        memory, descriptors = self.mib_per_min * self.minutes, self.descriptors_per_min * self.minutes
        is_short = self.minutes < SHORT_MIN
        noise = NOISE_SHORT_MIB if is_short else NOISE_MIB
        most = NOISE_SHORT_DESCRIPTORS if is_short else NOISE_DESCRIPTORS
        return memory < max(MAX_SLOPE_MIB_PER_MIN * self.minutes, noise) and descriptors < most


@dataclass
class Life:
    """Samples of one process: seconds since it was ready, MiB, descriptors."""

    name: str
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    def slope(self) -> Slope | None:
        """Return the slope; None if the process did not live long enough."""
        late = np.array([sample for sample in self.samples if sample[0] >= WARM_UP_S])
        if len(late) < 2 or late[-1, 0] - late[0, 0] < MIN_LIFE_S:
            return None
        minutes = (late[:, 0] - late[0, 0]) / 60
        (memory, _), (descriptors, _) = np.polyfit(minutes, late[:, 1], 1), np.polyfit(minutes, late[:, 2], 1)
        return Slope(
            self.name,
            round(float(minutes[-1]), 2),
            round(float(memory), 3),
            round(float(descriptors), 3),
            round(float(late[-1, 1]), 1),
            int(late[-1, 2]),
        )


class MemoryWatch:
    """Samples every process of a fleet.

    Attributes:
        lives: By process id and number of the process.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.lives: dict[tuple[str, int], Life] = {}

    async def run(self, over: asyncio.Event) -> None:
        """Sample until the soak ends."""
        while not over.is_set():
            now = time.monotonic()
            for part in self._fleet.parts:
                is_steady = part.process.is_running and not part.is_leaving and part.born_s
                if is_steady and (held := held_by(part.process.pid)) is not None:
                    life = self.lives.setdefault((part.name, part.generation), Life(part.name))
                    life.samples.append((now - part.born_s, *held))
            await asyncio.sleep(SAMPLE_S)

    def write(self, file: Path) -> None:
        """Write all samples as JSON: the curve shows when a process grew."""
        curves = [{"name": life.name, "samples": life.samples} for life in self.lives.values()]
        file.write_text(json.dumps(curves) + "\n")

    def slopes(self) -> list[Slope]:
        """Return the slopes of the processes that lived long enough."""
        return [slope for life in self.lives.values() if (slope := life.slope()) is not None]


def held_by(pid: int) -> tuple[float, int] | None:
    """Return a process's MiB and descriptors; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * _PAGE_MIB, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
