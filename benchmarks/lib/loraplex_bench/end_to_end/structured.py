"""Structured output beside plain text: time between tokens and tokens per second of rows that draw under masks.

Every request draws its tokens at random from random weights under a JSON schema that no output completes, or without one,
so rows of both kinds run for the same number of steps. Times are those at which an in-process session gets the tokens.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import prompt_ids
from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.constraints.types import CompiledConstraint
from loraplex_engine.messages import Ended, Submission, Submit
from loraplex_engine.sampling_params import SamplingParams, StoppingParams

from loraplex_bench.end_to_end.context import SUITE
from loraplex_bench.results import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.constraints.types import ConstraintState, MaskFiller
    from loraplex_engine.messages import StepOutputs
    from numpy.typing import NDArray

    from loraplex_bench.end_to_end.context import Bench
    from loraplex_bench.rig import Rig

CUTOFF_S: Final = 60.0
LEAST_GAP_MS: Final = 1e-3  # tokens of one message are 0 apart, and a reader that lags gets several steps in one
NO_TOKENS: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What each request is, and how many there are of a kind."""

    num_rows: int = 64
    prompt_tokens: int = 128
    output_tokens: int = 192
    num_adapters: int = 32


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Requests of one run.

    Attributes:
        name: In results.
        is_structured: One entry per group of `Sizes.num_rows` requests; the first group is measured.
        has_adapters: Whether the requests use adapters, or the base model alone.
        temperature: Every request's.
    """

    name: str
    is_structured: tuple[bool, ...]
    has_adapters: bool = True
    temperature: float = 1.0


PLAIN: Final = Mix(name="plain", is_structured=(False,))
STRUCTURED: Final = Mix(name="structured", is_structured=(True,))
BESIDE_PLAIN: Final = Mix(name="plain beside plain", is_structured=(False, False))
BESIDE_STRUCTURED: Final = Mix(name="plain beside structured", is_structured=(False, True))
PLAIN_BASE: Final = Mix(name="plain, base without LoRA", is_structured=(False,), has_adapters=False)
STRUCTURED_BASE: Final = Mix(name="structured, base without LoRA", is_structured=(True,), has_adapters=False)
PLAIN_GREEDY: Final = replace(PLAIN, name="plain, greedy", temperature=0.0)
STRUCTURED_GREEDY: Final = replace(STRUCTURED, name="structured, greedy", temperature=0.0)
PAIRS: Final = (
    (PLAIN, STRUCTURED),
    (PLAIN_BASE, STRUCTURED_BASE),
    (PLAIN_GREEDY, STRUCTURED_GREEDY),
    (BESIDE_PLAIN, BESIDE_STRUCTURED),
)
"""What is compared: of each pair, the second to the first of the same round."""
QUICK_PAIRS: Final = ((PLAIN, STRUCTURED), (BESIDE_PLAIN, BESIDE_STRUCTURED))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The first group of one run, while all its requests decode.

    Attributes:
        gap_ms: Median time between two tokens of a row.
        tokens_per_s: Tokens that the group gets in a second.
        extra_steps: Steps of the whole run beyond one for each token of a row: prompts, and steps that a row missed.
        mask_ms: Time in which the step loop filled masks, per step.
        mask_p99_ms: The filler's part of it, 99th percentile of the steps; 0 without masks.
    """

    gap_ms: float
    tokens_per_s: float
    extra_steps: int
    mask_ms: float
    mask_p99_ms: float


class TimedFiller:
    """A `MaskFiller` that notes how long each step's masks take.

    Args:
        filler: Fills them.

    Attributes:
        times_ms: One entry per step with structured rows.
    """

    def __init__(self, filler: MaskFiller) -> None:
        self._filler = filler
        self.times_ms: list[float] = []

    def fill(self, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> None:
        """Write the masks of one step."""
        began_s = time.perf_counter()
        self._filler.fill(states, out)
        self.times_ms.append((time.perf_counter() - began_s) * 1e3)


class StructuredRun:
    """Sends the requests of one mix at once and reads them to their ends.

    Args:
        rig: The engine.
        sizes: What each request is.
        mix: Kinds of requests.
        constraint: What structured requests keep to.
        filler: The engine's.
        workload: Number of the run; prompts differ between runs.
    """

    def __init__(
        self,
        rig: Rig,
        sizes: Sizes,
        mix: Mix,
        *,
        constraint: CompiledConstraint | None,
        filler: TimedFiller,
        workload: int,
    ) -> None:
        self._rig, self._sizes, self._mix = rig, sizes, mix
        self._constraint, self._filler, self._workload = constraint, filler, workload
        self._num_requests = sizes.num_rows * len(mix.is_structured)
        self._times: list[list[float]] = [[] for _ in range(self._num_requests)]
        self._num_open = self._num_requests

    def run(self) -> Measured:
        """Run it.

        Raises:
            RuntimeError: If a request fails, ends early or is too slow.
        """
        submissions = [self._submission(index) for index in range(self._num_requests)]
        before = replace(self._rig.engine.totals)
        self._filler.times_ms.clear()
        for submission in submissions:
            self._rig.engine.post(Submit(submission))
        until_s = time.perf_counter() + CUTOFF_S
        while self._num_open:
            outputs = self._rig.outbox.wait(1.0)
            if outputs is not None:
                self._take(outputs, time.perf_counter())
            self._rig.check_alive()
            if time.perf_counter() > until_s:
                raise RuntimeError(f"{self._mix.name}: {self._num_open} requests are open after {CUTOFF_S:g} s")
        after = self._rig.engine.totals
        num_steps = after.num_steps - before.num_steps
        return self._measure(num_steps, (after.mask_s - before.mask_s) / num_steps * 1e3)

    def _measure(self, num_steps: int, mask_ms: float) -> Measured:
        sizes = self._sizes
        if any(len(times) != sizes.output_tokens for times in self._times):
            raise RuntimeError(f"{self._mix.name}: rows have {[len(times) for times in self._times]} tokens")
        times: NDArray[np.float64] = np.array(self._times[: sizes.num_rows])
        begin_s = max(row[0] for row in self._times)
        end_s = min(row[-1] for row in self._times)
        is_inside = (times > begin_s) & (times <= end_s)
        gaps = np.diff(times, axis=1)[is_inside[:, 1:]]
        return Measured(
            gap_ms=float(np.median(gaps)) * 1e3,
            tokens_per_s=float(is_inside.sum()) / (end_s - begin_s),
            extra_steps=num_steps - sizes.output_tokens,
            mask_ms=mask_ms,
            mask_p99_ms=float(np.percentile(self._filler.times_ms or [0.0], 99)),
        )

    def _submission(self, index: int) -> Submission:
        sizes, mix = self._sizes, self._mix
        is_structured = mix.is_structured[index // sizes.num_rows]
        vocab_size = self._rig.setup.shape.info.vocab_size
        return Submission(
            session_id=self._rig.outbox.session_id,
            session_slot=index,
            request_id=f"request-{index}",
            prompt_token_ids=prompt_ids(self._workload, index, sizes.prompt_tokens, vocab_size=vocab_size),
            resumed_token_ids=NO_TOKENS,
            sampling=SamplingParams(temperature=mix.temperature, seed=index),
            stopping=StoppingParams(max_new_tokens=sizes.output_tokens, ignore_eos=True),
            adapter_digest=self._rig.digest(index % sizes.num_adapters) if mix.has_adapters else None,
            arrived_s=time.monotonic(),
            rules=OutputRules(self._structure()) if is_structured else None,
        )

    def _structure(self) -> ConstraintState:
        assert self._constraint is not None
        return self._constraint.start(())

    def _take(self, outputs: StepOutputs, now_s: float) -> None:
        for slot in outputs.token_slots.tolist():
            self._times[slot].append(now_s)
        for event in outputs.events:
            if isinstance(event, Ended):
                self._num_open -= 1
                if event.error is not None:
                    raise RuntimeError(f"{self._mix.name}: {event.error}")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to serve structured rows.

    Attributes:
        name: In results, after the mix's name; empty if there is one variant only.
        constraint: What structured requests keep to.
    """

    name: str
    constraint: CompiledConstraint


Kind = tuple[Mix, Variant | None]
"""What one run measures; None: it has no structured rows."""


def run_structured(
    bench: Bench,
    rig: Rig,
    sizes: Sizes,
    variants: Sequence[Variant],
    *,
    filler: TimedFiller,
    pairs: Sequence[tuple[Mix, Mix]] = PAIRS,
) -> None:
    """Measure every pair of mixes in turn, `Bench.repeats` times, after a round that does not count."""
    compared = [((first, None), (second, variant)) for first, second in pairs for variant in variants]
    kinds: list[Kind] = list(dict.fromkeys(kind for pair in compared for kind in pair))
    measured: dict[Kind, list[Measured]] = {kind: [] for kind in kinds}
    for number in range(bench.repeats + 1):
        for mix, variant in kinds if number % 2 else reversed(kinds):
            workload = 1000 * number + kinds.index((mix, variant))
            constraint = None if variant is None else variant.constraint
            found = StructuredRun(rig, sizes, mix, constraint=constraint, filler=filler, workload=workload).run()
            if number:
                measured[mix, variant].append(found)
    for kind in kinds:
        _add_kind(bench, rig, sizes, kind, measured[kind])
    for first, second in compared:
        _add_pair(bench, rig, sizes, second, measured[first], measured[second])


def _name(kind: Kind) -> str:
    mix, variant = kind
    return mix.name if variant is None or not variant.name else f"{mix.name}, {variant.name}"


def _case(rig: Rig, sizes: Sizes, kind: Kind) -> str:
    return f"{rig.setup.shape.name}/{rig.setup.family.name}/structured:{sizes.num_rows}/{_name(kind)}"


def _add_kind(bench: Bench, rig: Rig, sizes: Sizes, kind: Kind, found: list[Measured]) -> None:
    for metric, unit, values in (
        ("gap_p50", "ms", [each.gap_ms for each in found]),
        ("out_tok_per_s", "tok/s", [each.tokens_per_s for each in found]),
        ("extra_steps", "steps", [float(each.extra_steps) for each in found]),
        ("mask_per_step", "ms", [each.mask_ms for each in found]),
        ("mask_p99", "ms", [each.mask_p99_ms for each in found]),
    ):
        value = statistics.median(values)
        bench.add(Row(suite=SUITE, case=_case(rig, sizes, kind), metric=metric, value=value, unit=unit))


def _add_pair(bench: Bench, rig: Rig, sizes: Sizes, kind: Kind, first: list[Measured], second: list[Measured]) -> None:
    rounds = list(zip(first, second, strict=True))
    gaps = [max(b.gap_ms, LEAST_GAP_MS) / max(a.gap_ms, LEAST_GAP_MS) for a, b in rounds]
    rates = [b.tokens_per_s / a.tokens_per_s for a, b in rounds]
    for metric, values in (("gap_p50_of_plain", gaps), ("share_of_plain", rates)):
        value = statistics.median(values)
        unit = "share" if metric == "share_of_plain" else "times"
        bench.add(Row(suite=SUITE, case=_case(rig, sizes, kind), metric=metric, value=value, unit=unit))
        bench.results.note(f"{_name(kind)}: {metric} by round: {', '.join(f'{each:.3f}' for each in sorted(values))}")
