"""What bounds a decode step of a tensor-parallel group: each rank's bytes at the rate of its memory, and the collectives.

Bytes are those of the rank that reads most: its part of weights, keys and values, and of adapters. A group of one has no collectives,
so that the same formula is checked against single GPUs (`checked_floors`). Rates of links and latencies of collectives are those of
the simulator, which are assumed: no collective of several GPUs was measured yet.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from loraplex_common.projections import Split, ops_of
from loraplex_engine.rank_split import PairLoad, PairSplit, RankRates
from loraplex_engine.simulation.collectives import RankLink, StepCollectives
from loraplex_engine.simulation.devices import H100_RESULTS, NVLINK_4
from loraplex_engine.simulation.shapes import ALL_TARGETS, ATTENTION_TARGETS, ModelShape, base_model

from loraplex_bench.floors import FLOPS_PER_S, READ_BYTES_PER_S
from loraplex_bench.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.projections import LayerProjections

H100_RATES: Final = RankRates(
    link_bytes_per_s=NVLINK_4.bytes_per_s,
    latency_s=NVLINK_4.latency_s,
    read_bytes_per_s=READ_BYTES_PER_S,
    flops_per_s=FLOPS_PER_S,
)
_DECODE: Final = re.compile(r"llama2-7b/qkvo r16/decode:(\d+)x(\d+):(\d+)")


@dataclass(frozen=True)
class RankFloor:
    """Gives the least times of a group's decode steps.

    Args:
        shape: The model, with its degree.
        rates: What memory and link of a rank move.
    """

    shape: ModelShape
    rates: RankRates

    def step_s(self, rows: int, context: int) -> float:
        """Return the least time of a step without adapters, in seconds."""
        read = self.shape.weight_bytes + rows * context * self.shape.kv_bytes_per_token
        link = RankLink(bytes_per_s=self.rates.link_bytes_per_s, latency_s=self.rates.latency_s)
        return read / self.rates.read_bytes_per_s + StepCollectives(self.shape, link).seconds(rows, rows)

    def lora_s(self, rows: int, rank: int, split: PairSplit, targets: tuple[str, ...] = ALL_TARGETS) -> float:
        """Return the least time that adapters add, in seconds: each row has its own, all of one rank."""
        return sum(self._op_s(op, rows, rank, split) for op in self._ops(targets)) * self.shape.info.num_layers

    def pair_loads(self, rows: int, rank: int, targets: tuple[str, ...] = ALL_TARGETS) -> list[PairLoad]:
        """Return what the ranks of each fused projection of a layer choose their split by."""
        return [self._load(op, rows, rank) for op in self._ops(targets)]

    def _ops(self, targets: tuple[str, ...]) -> list[LayerProjections]:
        ops = ops_of(self.shape.info.layers[0])
        kept = [tuple(each for each in op.projections if each.name in targets) for op in ops]
        return [op for op in kept if op]

    def _load(self, op: LayerProjections, rows: int, rank: int) -> PairLoad:
        """Return an op's load; all its factors but those counted here are divided either way."""
        degree, split = self.shape.tp_degree, op[0].split
        shapes = [each.local_shape(degree) for each in op]
        if split is Split.INPUTS:
            numbers = rank * sum(outputs for _, outputs in shapes)
        else:
            numbers = rank * sum(inputs for inputs, _ in shapes)
        size = rows * numbers * self.shape.item_bytes
        h_size = rows * rank * len(op)
        return PairLoad(split=split, degree=degree, factor_bytes=size, products=rows * numbers, h_size=h_size)

    def _op_s(self, op: LayerProjections, rows: int, rank: int, split: PairSplit) -> float:
        load = self._load(op, rows, rank)
        widths = sum(sum(each.local_shape(self.shape.tp_degree)) for each in op)
        other_bytes = rows * rank * widths * self.shape.item_bytes - load.factor_bytes
        pairs_s = load.divided_s(self.rates) if split is PairSplit.DIVIDED else load.whole_s(self.rates)
        return other_bytes / self.rates.read_bytes_per_s + pairs_s


class CheckedFloor(NamedTuple):
    """A measured step of one GPU beside its floor.

    Attributes:
        case: What was measured.
        measured_s: Seconds of the step.
        floor_s: What `RankFloor` says of a group of one.
    """

    case: str
    measured_s: float
    floor_s: float

    @property
    def ratio(self) -> float:
        """How many times its floor the step takes."""
        return self.measured_s / self.floor_s


def checked_floors() -> Iterator[CheckedFloor]:
    """Give the decode steps of Llama-2-7B on one H100 that the simulator is fitted to."""
    floor = RankFloor(ModelShape(base_model("llama2-7b")), H100_RATES)
    rows = json.loads((ROOT / "benchmarks" / "results" / H100_RESULTS[1]).read_text())["rows"]
    for row in rows:
        found = _DECODE.fullmatch(row["case"])
        if found is None or row["metric"] != "step":
            continue
        num_rows, context, num_adapters = map(int, found.groups())
        lora_s = floor.lora_s(num_adapters, 16, PairSplit.WHOLE, ATTENTION_TARGETS)
        yield CheckedFloor(row["case"], row["value"] / 1e3, floor.step_s(num_rows, context) + lora_s)
