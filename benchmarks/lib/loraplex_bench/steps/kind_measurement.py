"""What kinds of adapters cost in a decode step: which steps are timed, and the bars beside their figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.projections import embedding_and_head, gated_decoder_layer
from loraplex_engine.step import NO_ADAPTER

from loraplex_bench.results import Row
from loraplex_bench.shapes import Shape, llama
from loraplex_bench.steps.part_images import DORA, FLORA, FLORA_RANK, HEAD, IA3, LORA, SHIRA

if TYPE_CHECKING:
    from loraplex_engine.model_runner import LoadHandle
    from numpy.typing import NDArray

    from loraplex_bench.results import Results
    from loraplex_bench.steps.kind_bench import KindSteps
    from loraplex_bench.steps.part_images import KindImage

ROWS: Final = 64
TIMED_STEPS: Final = 60
LOADING_STEPS: Final = 200
OP_US: Final = 3.0
MIXED: Final = (LORA, DORA, SHIRA, IA3)
KINDS: Final = (*MIXED, FLORA, HEAD)


def numbers_of(rows: int) -> dict[str, range]:
    """Return the adapters of each kind, as many as rows."""
    return {kind: range(place * rows, (place + 1) * rows) for place, kind in enumerate(KINDS)}


class Measurement:
    """Times steps of one runner and adds rows of results.

    Args:
        steps: The runner.
        results: Where rows go.
        shape: The model.
        images: Adapters by kind.
        rows: Decode rows, and adapters of each kind.
    """

    def __init__(
        self, steps: KindSteps, results: Results, shape: Shape, images: dict[str, KindImage], rows: int = ROWS
    ) -> None:
        self._steps, self._results, self._shape, self._images, self._rows = steps, results, shape, images, rows
        self._numbers = numbers_of(rows)
        self._num_ops = shape.geometry.num_decoder_layers * shape.geometry.num_decoder_ops

    def run(self) -> None:
        """Measure everything, DoRA's load before its step."""
        self._load_all(LORA)
        base_us = self._step("no adapter", np.full(self._rows, NO_ADAPTER))
        for rows in sorted({1, self._rows // 2}):
            self._step(LORA, np.array(self._numbers[LORA][:rows]))
        lora_us = self._step(LORA, np.array(self._numbers[LORA]))
        self._load_beside_steps()
        dora_us = self._step(DORA, np.array(self._numbers[DORA]))
        self._add(f"{self._rows} rows/{DORA}", "of LoRA's step", dora_us / lora_us, "share", floor=1.1)
        self._reload()
        self._load_all(SHIRA)
        self._sparse(base_us)
        self._load_all(IA3)
        self._step(IA3, np.array(self._numbers[IA3]))
        mixed = [self._numbers[MIXED[row % len(MIXED)]][row // len(MIXED)] for row in range(self._rows)]
        self._step("mixed", np.array(mixed))
        self._load_all(FLORA)
        self._flora(base_us)
        self._load_all(HEAD)
        self._outside(lora_us)

    def _step(self, name: str, adapters: NDArray[np.int_]) -> float:
        times = self._steps.step_times(adapters.astype(np.int32), TIMED_STEPS)
        median_us = statistics.median(times) * 1e6
        self._add(f"{len(adapters)} rows/{name}", "step", median_us, "us")
        return median_us

    def _sparse(self, base_us: float) -> None:
        added_us = self._step(SHIRA, np.array(self._numbers[SHIRA])) - base_us
        num_bytes = 4 * self._images[SHIRA].num_nonzeros * self._rows
        rate = self._steps.copy_bytes_per_s()
        floor_us, case = num_bytes / rate * 1e6, f"{self._rows} rows/{SHIRA}"
        self._results.note(
            f"a copy reads and writes {rate / 1e12:.2f} TB/s; SHiRA's non-zeros are {num_bytes / 1e9:.2f} GB a step"
        )
        self._add(case, "added", added_us, "us", floor=floor_us)
        self._add(case, "of its bar", added_us / (1.5 * floor_us + OP_US * self._num_ops), "share", floor=1.0)

    def _outside(self, lora_us: float) -> None:
        added_us = self._step(HEAD, np.array(self._numbers[HEAD])) - lora_us
        floor_us = self._images[HEAD].head_bytes * self._rows / self._steps.copy_bytes_per_s() * 1e6
        self._add(f"{self._rows} rows/{HEAD}", "added to LoRA's step", added_us, "us", floor=floor_us)

    def _flora(self, base_us: float) -> None:
        """Time FLoRA of all rows, of one alone, and of one among rows without an adapter.

        The floor of what it adds is W's bytes and the factors', at the rate of a copy.
        """
        geometry, rate = self._shape.geometry, self._steps.copy_bytes_per_s()
        projections = [projection for layer in geometry.layers for projection in layer]
        weight_bytes = sum(2 * each.in_features * each.out_features for each in projections)
        factor_bytes = sum(4 * FLORA_RANK * (each.in_features + each.out_features) for each in projections)
        self._results.note(f"one pass over W reads {weight_bytes / 1e9:.2f} GB")
        numbers = np.array(self._numbers[FLORA])
        one = np.full(self._rows, NO_ADAPTER)
        one[0] = numbers[0]
        self._step(FLORA, numbers[:1])
        for name, adapters, count in ((FLORA, numbers, self._rows), (f"one {FLORA}, others without", one, 1)):
            added_us = self._step(name, adapters) - base_us
            floor_us = (weight_bytes + count * factor_bytes) / rate * 1e6
            self._add(f"{self._rows} rows/{name}", "added", added_us, "us", floor=floor_us)

    def _load_all(self, kind: str) -> None:
        begin_s = time.perf_counter()
        handles = [self._steps.load(kind, number) for number in self._numbers[kind]]
        self._wait(handles)
        self._add(f"{len(handles)} adapters/{kind}", "load", (time.perf_counter() - begin_s) * 1e3, "ms")

    def _reload(self) -> None:
        """Time DoRA's load where c is on the host."""
        for number in self._numbers[DORA]:
            self._steps.unload(number)
        begin_s = time.perf_counter()
        self._wait([self._steps.load(DORA, number) for number in self._numbers[DORA]])
        milliseconds = (time.perf_counter() - begin_s) * 1e3
        self._add(f"{self._rows} adapters/{DORA}", "load, c known (as far as it fits)", milliseconds, "ms")

    def _load_beside_steps(self) -> None:
        """Load at DoRA's numbers: LoRA, which is copied alone; DoRA; DoRA whose c is known."""
        others = np.array(self._numbers[LORA], dtype=np.int32)
        alone = self._steps.step_times(others, LOADING_STEPS)
        for kind, name in ((LORA, "LoRA"), (DORA, "DoRA"), (DORA, "DoRA, c known,")):
            beside = self._time_loads(others, kind, f"{self._rows} rows/{LORA}, {self._rows} {name} loading")
            self._compare(alone, beside, f"{self._rows} rows/{LORA}, {self._rows} {name} loading")
            if name != "DoRA, c known,":
                for number in self._numbers[DORA]:
                    self._steps.unload(number)

    def _time_loads(self, others: NDArray[np.int32], kind: str, case: str) -> list[float]:
        """Return the times of steps while adapters load, one started per step."""
        waiting, handles, host_s = list(self._numbers[DORA]), list["LoadHandle"](), list[float]()

        def load_one() -> bool:
            if waiting:
                begin_s = time.perf_counter()
                handles.append(self._steps.load(kind, waiting.pop(0)))
                host_s.append(time.perf_counter() - begin_s)
            return not waiting and all(handle.is_done() for handle in handles)

        begin_s = time.perf_counter()
        beside = self._steps.step_times(others, LOADING_STEPS, load_one)
        self._add(case, "loads", (time.perf_counter() - begin_s) * 1e3, "ms")
        self._add(case, "host time of a load, median", statistics.median(host_s) * 1e6, "us")
        self._add(case, "host time of a load, longest", max(host_s) * 1e6, "us")
        late = float(np.mean(np.array(beside[: len(host_s)]) > 1.2 * statistics.median(beside)))
        self._add(case, "steps over 1.2 of the median while loads start", late, "share")
        return beside

    def _compare(self, alone: list[float], beside: list[float], case: str) -> None:
        for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0)):
            before_us, after_us = (float(np.quantile(times, share)) * 1e6 for times in (alone, beside))
            self._add(case, f"{name} alone", before_us, "us")
            self._add(case, f"{name} while loading", after_us, "us")
            self._add(case, f"{name} of alone", after_us / before_us, "share", floor=1.2 if name == "p99" else None)

    @staticmethod
    def _wait(handles: list[LoadHandle]) -> None:
        while not all(handle.is_done() for handle in handles):
            time.sleep(0.001)

    def _add(self, case: str, metric: str, value: float, unit: str, floor: float | None = None) -> None:
        case = f"{self._shape.name}/{case}"
        self._results.add(Row(suite="adapter_kinds", case=case, metric=metric, value=value, unit=unit, floor=floor))


def tiny_shape() -> Shape:
    """Return a model of a few megabytes with pages of a tile at least."""
    layer = gated_decoder_layer(hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=4, head_dim=64)
    info = replace(
        llama("tiny", inter=512, kv_heads=4, vocab=256),
        hidden_size=256,
        num_heads=4,
        head_dim=64,
        num_layers=2,
        layers=(layer,) * 2,
        outside=embedding_and_head(vocab_size=256, hidden_size=256, embedding="model.embed_tokens", lm_head="lm_head"),
    )
    return Shape(info=info, pool_gib=0.1)
