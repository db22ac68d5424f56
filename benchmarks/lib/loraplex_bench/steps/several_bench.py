"""Steps whose rows add several adapters up, and adapters of large ranks, beside steps of one adapter a row."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from loraplex_common.adapter_image import layout, to_bfloat16
from loraplex_engine.step import MoreAdapters

from loraplex_bench.results import Row
from loraplex_bench.rig import VALUE_STD
from loraplex_bench.shapes import AdapterFamily
from loraplex_bench.steps.kind_bench import KindBench
from loraplex_bench.steps.part_images import KindImage
from loraplex_bench.steps.plan import StepSize, make_plan

if TYPE_CHECKING:
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

    from loraplex_bench.results import Results
    from loraplex_bench.shapes import Shape

ROWS: Final = 64
TERMS: Final = 3
WIDE_ADAPTERS: Final = 4
TIMED_STEPS: Final = 60
PROMPT_TOKENS: Final = 256
SMALL: Final = "LoRA r16"
WIDE: Final = "LoRA r512"
RANKS: Final = {SMALL: 16, WIDE: 512}
BAR: Final = 1.05


def family_images(shape: Shape) -> dict[str, KindImage]:
    """Return an image of each rank on all projections; every page has the same random values."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape.geometry.page_bytes // 2, dtype=np.float32) * np.float32(VALUE_STD)
    page = to_bfloat16(values).view(np.uint8)
    found = {}
    for name, rank in RANKS.items():
        spec = AdapterFamily(targets="all", ranks=(rank,)).spec(shape, 0)
        num_pages = layout(shape.geometry, spec.sizes).num_pages
        found[name] = KindImage(spec.modules, np.tile(page, (num_pages, 1)))
    return found


def numbers_of(rows: int) -> dict[str, range]:
    """Return the numbers of each rank's adapters: a list of `TERMS` for each row, and a few wide ones."""
    return {SMALL: range(rows * TERMS), WIDE: range(rows * TERMS, rows * TERMS + WIDE_ADAPTERS)}


def list_plan(shape: Shape, lists: NDArray[np.int32], *, prompts: int, context: int, step_id: int) -> StepPlan:
    """Return a step of decode rows, then of prompts, with these lists of adapters, int32 ``[rows, T]``; -1 ends a list."""
    size = StepSize(num_decode=len(lists) - prompts, context=context, num_prompts=prompts, prompt_tokens=PROMPT_TOKENS)
    plan = make_plan(size, shape.pool, lists[:, 0], step_id=step_id)
    rows, places = np.nonzero(lists[:, 1:] >= 0)
    adapters = lists[rows, places + 1].astype(np.int32)
    scales = np.full(len(rows), 0.5, dtype=np.float32)
    return replace(plan, more_adapters=MoreAdapters(rows=rows.astype(np.int32), adapters=adapters, scales=scales))


class ListSteps(Protocol):
    """What the measurement asks of a runner."""

    def load_all(self) -> None:
        """Load every adapter."""
        ...

    def median_us(self, lists: NDArray[np.int32], prompts: int) -> float:
        """Return the median time of a step, us; see `list_plan`."""
        ...


class ListBench(KindBench):
    """A `ListSteps` of a CUDA runner."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self._numbers = numbers_of(rows)
        super().__init__(shape, family_images(shape), self._numbers, rows * TERMS)
        self._lists, self._prompts = np.zeros((0, 1), dtype=np.int32), 0

    def load_all(self) -> None:
        """See `ListSteps`."""
        handles = [self.load(kind, number) for kind, numbers in self._numbers.items() for number in numbers]
        while not all(handle.is_done() for handle in handles):
            pass

    def median_us(self, lists: NDArray[np.int32], prompts: int) -> float:
        """See `ListSteps`."""
        self._lists, self._prompts = lists, prompts
        return statistics.median(self.step_times(lists[:, 0], TIMED_STEPS)) * 1e6

    def _plan(self, adapters: NDArray[np.int32]) -> StepPlan:
        del adapters
        self._step_id += 1
        return list_plan(
            self._shape, self._lists, prompts=self._prompts, context=self._size.context, step_id=self._step_id
        )


class DryListSteps:
    """A `ListSteps` without a device: it makes the plans and takes no time."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self._shape, self._images, self._last = shape, family_images(shape), numbers_of(rows)[WIDE].stop

    def load_all(self) -> None:
        """See `ListSteps`."""

    def median_us(self, lists: NDArray[np.int32], prompts: int) -> float:
        """See `ListSteps`."""
        plan = list_plan(self._shape, lists, prompts=prompts, context=320, step_id=1)
        if max(plan.adapters.max(initial=-1), plan.more_adapters.adapters.max(initial=-1)) >= self._last:
            raise ValueError("a row names an adapter behind the table")
        return 1000.0 + int((lists >= 0).sum())


class ListMeasurement:
    """Times steps and adds rows of results.

    Args:
        steps: The runner.
        results: Where rows go.
        shape: The model.
        rows: Rows of the steps whose rows have `TERMS` adapters each.
    """

    def __init__(self, steps: ListSteps, results: Results, shape: Shape, rows: int = ROWS) -> None:
        self._steps, self._results, self._shape, self._rows = steps, results, shape, rows

    def run(self) -> None:
        """Measure everything."""
        self._steps.load_all()
        rows, every = self._rows, np.arange(self._rows * TERMS, dtype=np.int32)
        lists = every.reshape(TERMS, rows).T
        base = self._step(f"{rows} rows/no adapter", np.full((rows, 1), -1, dtype=np.int32))
        wide_base = self._step(f"{len(every)} rows/no adapter", np.full((len(every), 1), -1, dtype=np.int32))
        for count in sorted({1, rows // 2}):
            self._step(f"{count} rows/{SMALL}", lists[:count, :1])
        runs = [self._step(f"{rows} rows/{SMALL}, run {k + 1}", lists[:, k : k + 1]) - base for k in range(TERMS)]
        apart = self._step(f"{len(every)} rows/{SMALL}", every[:, None]) - wide_base
        added = self._step(f"{rows} rows/{TERMS} of {SMALL} each", lists) - base
        case = f"{rows} rows/{TERMS} of {SMALL} each"
        self._add(case, "added", added, "us")
        self._add(case, f"of the {TERMS} runs' added", added / sum(runs), "share", floor=BAR)
        self._add(case, f"of {len(every)} rows' added", added / apart, "share", floor=BAR)
        self._step(f"{rows} rows/the same {TERMS} of {SMALL}", np.tile(lists[:1], (rows, 1)))
        one_list = np.full_like(lists, -1)
        one_list[:, 0], one_list[0] = lists[:, 0], lists[0]
        self._step(f"{rows} rows/{SMALL}, one row {TERMS}", one_list)
        self._step(f"1 rows/{TERMS} of {SMALL}", lists[:1])
        self._prompts(lists)
        self._wide(base)

    def _prompts(self, lists: NDArray[np.int32]) -> None:
        """A prompt beside the decode rows: its further adapters take a pass each."""
        beside = f"{self._rows - 1} rows and a prompt of {PROMPT_TOKENS}"
        self._step(f"{beside}/{SMALL}", lists[:, :1], prompts=1)
        self._step(f"{beside}/{TERMS} of {SMALL} each", lists, prompts=1)

    def _wide(self, base_us: float) -> None:
        numbers = np.array(numbers_of(self._rows)[WIDE], dtype=np.int32)
        self._step(f"1 rows/{WIDE}", numbers[:1, None])
        mixed = np.arange(self._rows, dtype=np.int32)
        mixed[: len(numbers)] = numbers
        small = self._step(f"{self._rows} rows/{SMALL}, again", np.arange(self._rows, dtype=np.int32)[:, None])
        found = self._step(f"{self._rows} rows/{SMALL}, {len(numbers)} of them {WIDE}", mixed[:, None])
        self._add(f"{self._rows} rows/{len(numbers)} {WIDE}", "added", found - small, "us")
        self._add(f"{self._rows} rows/{SMALL}", "added", small - base_us, "us")
        self._step(f"a prompt of {PROMPT_TOKENS}/{WIDE}", numbers[:1, None], prompts=1)

    def _step(self, name: str, lists: NDArray[np.int32], prompts: int = 0) -> float:
        median_us = self._steps.median_us(np.ascontiguousarray(lists, dtype=np.int32), prompts)
        self._add(name, "step", median_us, "us")
        return median_us

    def _add(self, case: str, metric: str, value: float, unit: str, floor: float | None = None) -> None:
        case = f"{self._shape.name}/{case}"
        self._results.add(Row(suite="several_adapters", case=case, metric=metric, value=value, unit=unit, floor=floor))
