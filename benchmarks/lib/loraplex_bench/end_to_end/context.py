"""What the cases of one run share: weights and engines made once, results, and the numbering of workloads."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from loraplex_bench.end_to_end.replay import CUTOFF_S, Replay
from loraplex_bench.results import Results, Row
from loraplex_bench.rig import Rig, RigSetup
from loraplex_bench.weights import SharedWeights

if TYPE_CHECKING:
    from loraplex_client.workload import Measured, Trace
    from loraplex_engine.constraints.types import MaskFiller

    from loraplex_bench.shapes import Shape

SUITE = "end_to_end"


class Bench:
    """One run of the end-to-end benchmark.

    Args:
        repeats: Bursts of one row; the median counts.
        dependent_launch: For every engine.

    Attributes:
        results: Rows so far.
    """

    def __init__(self, *, repeats: int = 1, dependent_launch: bool | None = None) -> None:
        self.results = Results()
        self.repeats = repeats
        self._dependent_launch = dependent_launch
        self._weights: dict[tuple[str, bool], SharedWeights] = {}
        self._kept: tuple[RigSetup, Rig] | None = None
        self._workloads = itertools.count()

    def weights(self, shape: Shape) -> SharedWeights | None:
        """Return a shape's weights, made at first use; another shape's are freed."""
        if shape.model_dir is not None:
            return None
        key = shape.name, shape.is_fp8
        if key not in self._weights:
            from loraplex_bench.random_weights import RandomWeights

            self.release()
            source = RandomWeights(
                dtype=torch.bfloat16,
                device=torch.device("cuda", 0),
                has_blocks=shape.has_fp8_blocks,
                absent=("lm_head.weight",) if shape.info.tied_embeddings else (),
            )
            self._weights[key] = SharedWeights(source)
        return self._weights[key]

    def rig(self, setup: RigSetup) -> Rig:
        """Return an engine of a setup: the last one if it has the same, else a new one in its place."""
        if self._kept is not None and self._kept[0] == setup:
            return self._kept[1]
        self.close_rig()
        rig = self.new_rig(setup)
        self._kept = (setup, rig)
        return rig

    def new_rig(self, setup: RigSetup, *, filler: MaskFiller | None = None) -> Rig:
        """Return an engine that the caller closes; ``filler`` fills the masks of structured outputs, if it has any."""
        weights = self.weights(setup.shape)
        rig = Rig(replace(setup, dependent_launch=self._dependent_launch), weights, filler)
        allocated = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.results.note(
            f"{setup.description}; ready in {rig.ready_s:.1f} s, graphs captured in {rig.capture_s:.2f} s, "
            f"{allocated:.1f} GiB allocated on the device"
        )
        return rig

    def close_rig(self) -> None:
        """Close the engine that is kept, if any."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None
        free_device()

    def release(self) -> None:
        """Give all memory of the device back."""
        self.close_rig()
        self._weights.clear()
        free_device()

    def replay(self, rig: Rig, trace: Trace, *, cutoff_s: float = CUTOFF_S) -> Measured:
        """Run a trace with prompts that no workload before had."""
        return Replay(rig, trace, workload=next(self._workloads), cutoff_s=cutoff_s).run()

    def add(self, row: Row) -> None:
        """Take a row."""
        self.results.add(row)


def free_device() -> None:
    """Return what closed engines held to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
