"""Drives a model runner with hand-made plans: sequences, their pages and chunks, without a scheduler."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import (
    FROM_DEVICE,
    NO_ADAPTER,
    MoreAdapters,
    SamplingArrays,
    SlotSetup,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.model_runner import ModelRunner
    from loraplex_engine.pool_geometry import PoolGeometry
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one sequence samples; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    num_logprobs: int = -1
    ban_stops: bool = False


def sampling_arrays(draws: Sequence[Draw], positions: Sequence[int]) -> SamplingArrays:
    """Transpose per-sequence settings into the plan's arrays."""

    def column(name: str, dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.array([getattr(draw, name) for draw in draws], dtype=dtype)

    return SamplingArrays(
        temperature=column("temperature", np.float32),  # type: ignore[arg-type]
        top_k=column("top_k", np.int32),  # type: ignore[arg-type]
        top_p=column("top_p", np.float32),  # type: ignore[arg-type]
        min_p=column("min_p", np.float32),  # type: ignore[arg-type]
        repetition_penalty=column("repetition_penalty", np.float32),  # type: ignore[arg-type]
        presence_penalty=column("presence_penalty", np.float32),  # type: ignore[arg-type]
        frequency_penalty=column("frequency_penalty", np.float32),  # type: ignore[arg-type]
        seed=column("seed", np.uint64),  # type: ignore[arg-type]
        position=np.array(positions, dtype=np.int32),
        num_logprobs=column("num_logprobs", np.int32),  # type: ignore[arg-type]
        ban_stops=column("ban_stops", np.bool_),  # type: ignore[arg-type]
    )


@dataclass(kw_only=True, slots=True)
class Sequence_:  # noqa: N801
    """One sequence as the harness sees it.

    Attributes:
        more: Indices and scales of the adapters that are added to ``adapter``.
        forced: If not empty, tokens fed instead of the drawn ones (teacher forcing).
        chunks: Lengths of the prefill's chunks; the rest of the prompt is one more chunk.
        allowed: If not empty, the sequence draws under a mask of these tokens.
        drawn: Tokens sampled so far.
        computed: Tokens in the pool.
    """

    slot: int
    prompt: list[int]
    adapter: int = NO_ADAPTER
    scale: float = 1.0
    more: list[tuple[int, float]] = field(default_factory=list)
    draw: Draw = field(default_factory=Draw)
    forced: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    setup: SlotSetup | None = None
    allowed: tuple[int, ...] = ()
    pages: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    failure: str | None = None
    computed: int = 0

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt is in the pool."""
        return self.computed >= len(self.prompt)

    def next_chunk(self) -> list[int]:
        """Return the tokens of the next step."""
        if not self.is_decoding:
            length = self.chunks.pop(0) if self.chunks else len(self.prompt) - self.computed
            return self.prompt[self.computed : self.computed + length]
        if self.forced:
            return [self.forced[self.computed - len(self.prompt)]]
        return [FROM_DEVICE]


def _more_adapters(rows: Sequence[Sequence_]) -> MoreAdapters:
    found = [(row, index, scale) for row, sequence in enumerate(rows) for index, scale in sequence.more]
    at, indices, scales = zip(*found, strict=True) if found else ((), (), ())
    return MoreAdapters(
        rows=np.array(at, dtype=np.int32),
        adapters=np.array(indices, dtype=np.int32),
        scales=np.array(scales, dtype=np.float32),
    )


class Harness:
    """Runs sequences on a runner; pages come off one list, shuffled so that no test relies on their order."""

    def __init__(self, runner: ModelRunner, geometry: PoolGeometry, num_pages: int, *, seed: int = 0) -> None:
        self.runner = runner
        self.geometry = geometry
        self.free = np.random.default_rng(seed).permutation(num_pages).tolist()
        self._num_slots = 0
        self._num_adapters = 0
        self._step_id = 0

    def add(self, prompt: Iterable[int], **fields: object) -> Sequence_:
        """Make a sequence in a new slot."""
        sequence = Sequence_(slot=self._num_slots, prompt=[int(token) for token in prompt], **fields)  # type: ignore[arg-type]
        self._num_slots += 1
        if sequence.setup is not None:
            sequence.setup = replace(sequence.setup, slot=sequence.slot)
        return sequence

    def load(self, spec: AdapterSpec, image: NDArray[np.uint8]) -> int:
        """Load an adapter into free pages and return its index, once it may be used."""
        index, self._num_adapters = self._num_adapters, self._num_adapters + 1
        pages = np.array([self.free.pop() for _ in range(len(image))], dtype=np.int32)
        handle = self.runner.load_adapter(index, spec, pages, image)
        done = threading.Event()
        handle.add_done_callback(done.set)
        assert done.wait(30), "the copy never ended"
        assert handle.is_done()
        return index

    def plan(self, sequences: Sequence[Sequence_]) -> StepPlan:
        """Make the next step of some sequences: each one decode token or prefill chunk."""
        rows = sorted(sequences, key=lambda sequence: not sequence.is_decoding)
        num_decode_rows = sum(sequence.is_decoding for sequence in rows)
        chunks = [sequence.next_chunk() for sequence in rows]
        for sequence, chunk in zip(rows, chunks, strict=True):
            while len(sequence.pages) < self.geometry.num_blocks(sequence.computed + len(chunk)):
                sequence.pages.append(self.free.pop())
        width = max(len(sequence.pages) for sequence in rows)
        tables = np.full((len(rows), width), -1, dtype=np.int32)
        for row, sequence in enumerate(rows):
            tables[row, : len(sequence.pages)] = sequence.pages
        finished = [
            row
            for row, (s, chunk) in enumerate(zip(rows, chunks, strict=True))
            if s.computed + len(chunk) >= len(s.prompt)
        ]
        self._step_id += 1
        plan = StepPlan(
            step_id=self._step_id,
            slots=np.array([sequence.slot for sequence in rows], dtype=np.int32),
            num_tokens=np.array([len(chunk) for chunk in chunks], dtype=np.int32),
            starts=np.array([sequence.computed for sequence in rows], dtype=np.int32),
            token_ids=np.array([token for chunk in chunks for token in chunk], dtype=np.int32),
            block_tables=tables,
            adapters=np.array([sequence.adapter for sequence in rows], dtype=np.int32),
            adapter_scales=np.array([sequence.scale for sequence in rows], dtype=np.float32),
            num_decode_rows=num_decode_rows,
            sample_rows=np.array(finished, dtype=np.int32),
            sampling=sampling_arrays(
                [rows[row].draw for row in finished],
                [max(rows[row].computed + len(chunks[row]) - len(rows[row].prompt), 0) for row in finished],
            ),
            more_adapters=_more_adapters(rows),
            masked=np.array([at for at, row in enumerate(finished) if rows[row].allowed], dtype=np.int32),
            setups=tuple(s.setup for s in rows if s.computed == 0 and s.setup is not None),
        )
        for sequence, chunk in zip(rows, chunks, strict=True):
            sequence.computed += len(chunk)
        return plan

    @staticmethod
    def fill(masks: NDArray[np.int32], plan: StepPlan, sequences: Iterable[Sequence_]) -> None:
        """Fill the masks of a plan."""
        by_slot = {sequence.slot: sequence for sequence in sequences}
        for row, slot in enumerate(plan.slots[plan.sample_rows[plan.masked]].tolist()):
            bits = np.zeros(32 * masks.shape[1], dtype=np.uint8)
            bits[list(by_slot[slot].allowed)] = 1
            masks[row] = np.packbits(bits, bitorder="little").view(np.int32)

    @staticmethod
    def absorb(sequences: Iterable[Sequence_], result: StepResult) -> None:
        """Pass a result's tokens on to their sequences."""
        by_slot = {sequence.slot: sequence for sequence in sequences}
        for row, (slot, token) in enumerate(zip(result.slots.tolist(), result.token_ids.tolist(), strict=True)):
            by_slot[slot].drawn.append(token)
            if row in result.logprobs:
                by_slot[slot].logprobs.append(result.logprobs[row])
        for slot, entries in result.prompt_logprobs.items():
            by_slot[slot].prompt_logprobs.extend(entries)
        for slot, error in result.failed_slots.items():
            by_slot[slot].failure = error.message

    def step(self, sequences: Sequence[Sequence_]) -> StepResult:
        """Run one step and absorb its result."""
        plan = self.plan(sequences)
        handle = self.runner.launch(plan)
        if len(plan.masked):
            self.fill(handle.masks, plan, sequences)
            handle.draw()
        result = handle.wait()
        self.absorb(sequences, result)
        return result

    def generate(self, sequences: Sequence[Sequence_], num_tokens: int, *, eos: int | None = None) -> list[list[int]]:
        """Step until every sequence drew ``num_tokens`` or ``eos``; return the tokens of each."""
        running = list(sequences)
        while running:
            self.step(running)
            running = [s for s in running if len(s.drawn) < num_tokens and (eos is None or eos not in s.drawn)]
        return [sequence.drawn for sequence in sequences]

    def release(self, sequences: Iterable[Sequence_]) -> None:
        """Take the pages of finished sequences back."""
        for sequence in sequences:
            self.free.extend(sequence.pages)
            sequence.pages.clear()
