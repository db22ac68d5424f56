"""A model runner that computes a hash, and the scheduler's oracle: it checks every plan against the plans before it.

A sequence's next token is a hash of its tokens, its adapters, its seed and the position, read back from the "pool"
through the plan's block tables. So if the scheduler mixes up a page, an adapter or an input, a token changes or the
runner raises. A page may be in several rows, but then all rows only read it, and all have the adapter and the scale it
was written with.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from loraplex_common.errors import LoraplexError
from loraplex_engine.step import SlotSetup, StepPlan, StepResult, TokenLogprobs
from numpy.typing import NDArray
from support.fake_adapters import FakeAdapter, fake_geometry, fake_image
from support.plan_checks import check_pages, check_shapes, indices_of, indices_of_row, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec, Geometry

Adapters = tuple[tuple[str, float], ...]
"""Digest and scale of each adapter that a row adds up, in order."""
VOCAB_SIZE = 50
NO_OWNER = -1


def draw(
    tokens: NDArray[np.int32],
    adapters: Adapters,
    seed: int,
    banned: tuple[int, ...] = (),
    allowed: Callable[[int], bool] = lambda _token: True,
) -> int:
    """Return the token after ``tokens``; -1 if none may follow."""
    named = "+".join(f"{digest}/{scale}" for digest, scale in adapters) or "/1.0"
    text = np.ascontiguousarray(tokens, dtype=np.int32).tobytes() + f"{named}/{seed}".encode()
    token = zlib.crc32(text) % VOCAB_SIZE
    candidates = [(token + offset) % VOCAB_SIZE for offset in range(VOCAB_SIZE)]
    return next((each for each in candidates if each not in banned and allowed(each)), -1)


@dataclass
class FakeStep:
    """A launched plan; computed when its result, or a later one's, is waited for."""

    runner: FakeRunner
    plan: StepPlan
    occupants: NDArray[np.int64]
    adapters: dict[int, FakeAdapter]
    result: StepResult | None = None
    is_drawn: bool = False
    masks: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.masks = np.zeros((len(self.plan.masked), -(-VOCAB_SIZE // 32)), dtype=np.int32)
        self.is_drawn = not len(self.plan.masked)

    def is_done(self) -> bool:
        return self.result is not None

    def draw(self) -> None:
        require(not self.is_drawn, f"step {self.plan.step_id} awaits no masks")
        require(
            all(step is self for step in self.runner.launched), "masks are filled before all earlier results are read"
        )
        self.is_drawn = True

    def adapters_of(self, row: int) -> Adapters:
        """Digests and scales of a row's adapters."""
        more = self.plan.more_adapters
        scales = [float(self.plan.adapter_scales[row]), *more.scales[more.rows == row].tolist()]
        indices = indices_of_row(self.plan, row)
        return tuple((self.adapters[each].spec.digest, scale) for each, scale in zip(indices, scales, strict=False))

    def allows(self, index: int, token: int) -> bool:
        """Whether a sampling row may draw a token."""
        row = np.flatnonzero(self.plan.masked == index)
        return not row.size or bool(int(self.masks[row[0], token // 32]) >> (token % 32) & 1)

    def wait(self) -> StepResult:
        return self.runner.compute_until(self)


@dataclass
class _Slot:
    """The runner's state of a slot's occupant."""

    occupant: int
    num_computed: int = 0
    next_position: int | None = None
    setup: SlotSetup | None = None


class FakeRunner:
    """Implements `ModelRunner`.

    Args:
        pipeline_depth: 1 computes in `launch`; 2 computes when results are waited for.
        loads_at_once: Adapters are loaded by `load_adapter`; else by `finish_load`.
    """

    backend: ClassVar[str] = "fake"
    weight_norms: ClassVar[tuple[float, ...]] = ()

    def __init__(
        self,
        *,
        num_pages: int,
        page_bytes: int,
        block_tokens: int,
        pipeline_depth: int = 1,
        loads_at_once: bool = True,
        max_num_batched_tokens: int = 1 << 30,
    ) -> None:
        self._depth = pipeline_depth
        self._block_tokens = block_tokens
        self._max_num_batched_tokens = max_num_batched_tokens
        self._loads_at_once = loads_at_once
        self._tokens = np.full((num_pages, block_tokens), -1, dtype=np.int32)
        self._owners = np.full((num_pages, block_tokens), NO_OWNER, dtype=np.int64)
        self._memory = np.zeros((num_pages, page_bytes), dtype=np.uint8)
        self._slots: dict[int, _Slot] = {}
        self._num_occupants = 0
        self._identities: dict[Adapters, int] = {}
        self._launched: deque[FakeStep] = deque()
        self._next_step = 0
        self._last_tokens: dict[int, int] = {}
        self.adapters: dict[int, FakeAdapter] = {}
        self.loading: list[FakeAdapter] = []
        self.fail_slots: dict[int, str] = {}
        self.incompatible: dict[str, LoraplexError] = {}
        self.unbindable: dict[str, LoraplexError] = {}
        self.raise_on_launch: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.num_tokens = 0
        self.is_closed = False

    @property
    def geometry(self) -> Geometry:
        return fake_geometry(self._memory.shape[1])

    @property
    def pipeline_depth(self) -> int:
        return self._depth

    # --- adapters ---

    def check_adapter(self, spec: AdapterSpec) -> None:
        if spec.digest in self.incompatible:
            raise self.incompatible[spec.digest]

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> None:
        pass

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> FakeAdapter:
        require(index not in self.adapters, f"index {index} is bound already")
        require(source.shape == (len(pages), self._memory.shape[1]), f"source has shape {source.shape}")
        for step in self._launched:
            require(not np.isin(pages, step.plan.block_tables).any(), "a page is loaded into while a step reads it")
        for other in self.adapters.values():
            require(not np.isin(pages, other.pages).any(), "a page belongs to two adapters")
        if spec.digest in self.unbindable:
            raise self.unbindable[spec.digest]
        adapter = FakeAdapter(spec, pages, source)
        self.adapters[index] = adapter
        self.loading.append(adapter)
        if self._loads_at_once:
            self.finish_load(adapter)
        return adapter

    def finish_load(self, adapter: FakeAdapter) -> None:
        """Copy the image, after the steps that were launched before."""
        self.loading.remove(adapter)
        while self._launched:
            self._compute(self._launched.popleft())
        self._memory[adapter.pages] = adapter.source
        self._owners[adapter.pages] = NO_OWNER
        adapter.is_loaded = True
        for callback in adapter.callbacks:
            callback()

    def unload_adapter(self, index: int) -> None:
        adapter = self.adapters.pop(index)
        require(adapter.is_loaded, f"index {index} is unbound while it is loaded")
        for step in self._launched:
            require(index not in indices_of(step.plan), f"index {index} is unbound while a step uses it")

    # --- steps ---

    def launch(self, plan: StepPlan) -> FakeStep:
        self.gate.wait()
        if self.raise_on_launch is not None:
            raise self.raise_on_launch
        require(plan.step_id == self._next_step, f"step {plan.step_id} follows {self._next_step - 1}")
        require(all(step.is_drawn for step in self._launched), "a step is launched before an earlier one was drawn")
        self._next_step += 1
        check_shapes(plan, self._max_num_batched_tokens)
        launched, adapter_pages = [each.plan for each in self._launched], [a.pages for a in self.adapters.values()]
        check_pages(plan, launched, adapter_pages, self._block_tokens)
        occupants = self._check_rows(plan)
        for index in indices_of(plan):
            require(index in self.adapters and self.adapters[index].is_loaded, f"adapter {index} is not loaded")
        step = FakeStep(self, plan, occupants, dict(self.adapters))
        self._launched.append(step)
        require(len(self._launched) <= self._depth, f"{len(self._launched)} steps in flight")
        if self._depth == 1 and step.is_drawn:
            self.compute_until(step)
        return step

    def compute_until(self, step: FakeStep) -> StepResult:
        """Compute launched plans in order up to a step."""
        while step.result is None:
            require(self._launched[0].is_drawn, f"step {step.plan.step_id} is waited for and awaits masks")
            self._compute(self._launched.popleft())
        return step.result

    @property
    def launched(self) -> list[FakeStep]:
        """Steps that have not been computed."""
        return list(self._launched)

    def close(self) -> None:
        self.is_closed = True

    def _check_rows(self, plan: StepPlan) -> NDArray[np.int64]:
        setups = {setup.slot: setup for setup in plan.setups}
        occupants = np.empty(len(plan.slots), dtype=np.int64)
        for row, slot in enumerate(plan.slots.tolist()):
            start = int(plan.starts[row])
            require(start > 0 or slot in setups, f"slot {slot} has a new occupant without a setup")
            if slot in setups:
                require(row >= plan.num_decode_rows, "a sequence begins with a decode row")
                require(start % self._block_tokens == 0, f"a sequence begins within a block, at {start}")
                require(start == 0 or setups[slot].prompt_logprobs < 0, "probabilities asked for are not computed")
                self._num_occupants += 1
                self._slots[slot] = _Slot(self._num_occupants, num_computed=start, setup=setups[slot])
            state = self._slots[slot]
            require(state.num_computed == plan.starts[row], f"slot {slot} goes on at {plan.starts[row]}: {state}")
            state.num_computed += int(plan.num_tokens[row])
            if row < plan.num_decode_rows:
                require(state.next_position is not None, f"slot {slot} decodes before its prefill has ended")
            occupants[row] = state.occupant
        for index, row in enumerate(plan.sample_rows.tolist()):
            state = self._slots[int(plan.slots[row])]
            position = int(plan.sampling.position[index])
            require(state.next_position in (None, position), f"position {position} is not next: {state}")
            state.next_position = position + 1
        return occupants

    def _compute(self, step: FakeStep) -> None:
        plan = step.plan
        ends = np.cumsum(plan.num_tokens)
        sequences = []
        for row, slot in enumerate(plan.slots.tolist()):
            inputs = plan.token_ids[ends[row] - plan.num_tokens[row] : ends[row]].copy()
            if row < plan.num_decode_rows:
                inputs[0] = self._last_tokens[slot]
            positions = np.arange(plan.starts[row], plan.starts[row] + plan.num_tokens[row])
            pages = plan.block_tables[row, positions // self._block_tokens]
            self._tokens[pages, positions % self._block_tokens] = inputs
            self._owners[pages, positions % self._block_tokens] = self._identity(step, row)
            self._memory[pages] = 255
            sequences.append(self._read(step, row))
        self.num_tokens += len(plan.token_ids)
        step.result = self._sample(step, sequences)

    def _identity(self, step: FakeStep, row: int) -> int:
        """Return a number for the adapters and scales of a row, on which its keys and values depend besides tokens."""
        return self._identities.setdefault(step.adapters_of(row), len(self._identities))

    def _read(self, step: FakeStep, row: int) -> NDArray[np.int32]:
        plan = step.plan
        positions = np.arange(plan.starts[row] + plan.num_tokens[row])
        pages = plan.block_tables[row, positions // self._block_tokens]
        owners = self._owners[pages, positions % self._block_tokens]
        require(bool((owners == self._identity(step, row)).all()), f"slot {plan.slots[row]} reads another's pages")
        for index in indices_of_row(plan, row):
            adapter = step.adapters[index]
            image = fake_image(adapter.spec.digest, len(adapter.pages), self._memory.shape[1])
            require(bool((self._memory[adapter.pages] == image).all()), f"adapter {index}'s pages were overwritten")
        tokens: NDArray[np.int32] = self._tokens[pages, positions % self._block_tokens]
        return tokens

    def _sample(self, step: FakeStep, sequences: list[NDArray[np.int32]]) -> StepResult:
        plan = step.plan
        token_ids = np.empty(len(plan.sample_rows), dtype=np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        for index, row in enumerate(plan.sample_rows.tolist()):
            setup = self._setups_of(step, row)
            banned = setup.stop_token_ids if plan.sampling.ban_stops[index] and setup else ()
            seed = int(plan.sampling.seed[index])
            token_ids[index] = draw(sequences[row], step.adapters_of(row), seed, banned, partial(step.allows, index))
            self._last_tokens[int(plan.slots[row])] = int(token_ids[index])
            if plan.sampling.num_logprobs[index] >= 0:
                logprobs[index] = _logprobs(int(token_ids[index]), int(plan.sampling.num_logprobs[index]))
        failed = {slot: LoraplexError(reason) for slot, reason in self.fail_slots.items() if slot in plan.slots}
        slots = plan.slots[plan.sample_rows]
        failed |= {int(slots[row]): LoraplexError("nothing left") for row in np.flatnonzero(token_ids < 0)}
        return StepResult(
            step_id=plan.step_id,
            slots=plan.slots[plan.sample_rows],
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(step),
            failed_slots=failed,
        )

    def _setups_of(self, step: FakeStep, row: int) -> SlotSetup | None:
        state = self._slots[int(step.plan.slots[row])]
        return state.setup if state.occupant == step.occupants[row] else None

    def _prompt_logprobs(self, step: FakeStep) -> dict[int, list[TokenLogprobs]]:
        """Return one entry per input token of a prefill except the sequence's first, named after its position."""
        entries: dict[int, list[TokenLogprobs]] = {}
        for row, slot in enumerate(step.plan.slots.tolist()):
            setup = self._setups_of(step, row)
            if setup is not None and setup.prompt_logprobs >= 0 and row >= step.plan.num_decode_rows:
                first, count = int(step.plan.starts[row]), int(step.plan.num_tokens[row])
                entries[slot] = [_logprobs(at, setup.prompt_logprobs) for at in range(max(1, first), first + count)]
        return {slot: listed for slot, listed in entries.items() if listed}


def _logprobs(token: int, num: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_ids=np.full(1 + num, token, dtype=np.int32), logprobs=np.full(1 + num, -1.0, dtype=np.float32)
    )
