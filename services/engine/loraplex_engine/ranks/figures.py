"""What each rank of a group counts about itself, and what rank 0 knows of it, for metrics.

Other ranks say it with every sign that they live, twice a second; a step itself sends nothing.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loraplex_engine.rank_split import PairSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFigures:
    """Figures of one rank since its start.

    Attributes:
        num_steps: Steps computed.
        step_s: Seconds that they took, collectives included.
        collective_s: Seconds of `step_s` in collectives, which include the wait for slower ranks.
        adapter_pages: Pages of the pool that adapters have now.
        resident_bytes: Memory of the rank's process.
    """

    num_steps: int = 0
    step_s: float = 0.0
    collective_s: float = 0.0
    adapter_pages: int = 0
    resident_bytes: int = 0

    def to_text(self) -> str:
        """Encode them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> RankFigures:
        """Decode what `to_text` wrote."""
        return cls(**json.loads(text))


def resident_bytes() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(kw_only=True, slots=True)
class RankBook:
    """What rank 0 knows of the group; written by its threads, read by the one that answers scrapes.

    Attributes:
        others: Latest figures of every other rank; a rank is missing until it has said some.
        collective_s: Returns the seconds that rank 0's own steps have spent in collectives.
        pair_splits: Returns how often pairs of a fused projection were computed each way; all ranks do the same.
    """

    others: dict[int, RankFigures] = field(default_factory=dict)
    collective_s: Callable[[], float] = lambda: 0.0
    pair_splits: Callable[[], Mapping[PairSplit, int]] = dict
