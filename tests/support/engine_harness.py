"""A whole engine in this process, driven synchronously: submit, wait, compare. No gRPC, no store.

Images that requests want are taken from `EngineHarness.images`, as a store would supply them; adapters can also be put
into the arena beforehand with `add_image`.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors, pack
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterNotFoundError
from loraplex_engine.limits import MAX_ADDED_TOKENS, EngineLimits, SchedulingPolicy
from loraplex_engine.loop.engine import Engine, RunnerFactory
from loraplex_engine.loop.outbox import SessionOutbox
from loraplex_engine.messages import (
    CloseSession,
    Ended,
    ImageArrived,
    ImageRefused,
    Loading,
    Started,
    StepOutputs,
    StoreEvent,
    Submission,
    Submit,
    TokenWithLogprobs,
    WantImage,
)
from loraplex_engine.sampling_params import SamplingParams, StoppingParams
from loraplex_engine.step import TokenLogprobs
from numpy.typing import NDArray
from support.adapters import Recipe, adapter_tensors, module_name
from support.decoder_shapes import PROJECTIONS, pair_tensors
from support.fake_adapters import fake_image, fake_pool, fake_spec
from support.fake_runner import FakeRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from loraplex_engine.constraints.types import MaskFiller

WAIT_S = 60.0
NO_GROWTH = SchedulingPolicy(growth_quantile=0.0)
"""Admission that expects no growth, so that small pools come under pressure."""


@dataclass
class Generation:
    """The outcome of one request."""

    session_slot: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    start: Started | None = None
    num_loading: int = 0
    end: Ended | None = None
    num_resumed: int = 0

    @property
    def next_position(self) -> int:
        """Position in the output of the next token to come."""
        return self.num_resumed + len(self.tokens)


@dataclass
class EngineHarness:
    """An engine with one session.

    Attributes:
        images: digest -> (spec, image) that the "store" has; other digests are refused with AdapterNotFoundError.
        crashes: Errors that ended the loop.
    """

    engine: Engine
    images: dict[str, tuple[AdapterSpec, NDArray[np.uint8]]]
    crashes: list[BaseException]
    store_events: list[StoreEvent]
    outbox: SessionOutbox = field(init=False)
    generations: dict[int, Generation] = field(default_factory=dict)
    next_slot: int = 0

    def __post_init__(self) -> None:
        self.outbox = self.engine.open_session()

    # --- adapters ---

    def add_adapter(self, spec: AdapterSpec, tensors: Tensors) -> None:
        """Let the store have an adapter, packed for this engine's geometry."""
        self.images[spec.digest] = (spec, pack(self.engine.geometry, spec, tensors))

    def add_image(self, digest: str) -> None:
        """Put an image of the store into the arena now, as an unsolicited push."""
        spec, image = self.images[digest]
        slots = self.engine.grant_slots(digest, len(image), is_wanted=False).result(WAIT_S)
        assert slots is not None, "the arena is full"
        self.engine.arena.view[list(slots)] = image
        self.engine.post(ImageArrived(spec, slots))

    # --- requests ---

    def submit(
        self,
        prompt: Sequence[int],
        *,
        adapter: str | None = None,
        max_new_tokens: int | None = 16,
        temperature: float = 0.0,
        ignore_eos: bool = True,
        sampling: SamplingParams | None = None,
        outbox: SessionOutbox | None = None,
        **fields: object,
    ) -> Generation:
        """Submit a request, greedy by default; its `Generation` fills while `wait` runs."""
        submission = Submission(
            session_id=(outbox or self.outbox).session_id,
            session_slot=self.next_slot,
            request_id=f"request-{self.next_slot}",
            prompt_token_ids=np.array(prompt, dtype=np.int32),
            resumed_token_ids=np.empty(0, dtype=np.int32),
            sampling=sampling or SamplingParams(temperature=temperature),
            stopping=StoppingParams(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
            adapter_digest=adapter,
            arrived_s=time.monotonic(),
        )
        self.next_slot += 1
        generation = self.generations[submission.session_slot] = Generation(submission.session_slot)
        submission = replace(submission, **fields)  # type: ignore[arg-type]
        generation.num_resumed = len(submission.resumed_token_ids)
        self.engine.post(Submit(submission))
        return generation

    def wait(self, generations: Sequence[Generation], timeout_s: float = WAIT_S) -> list[Generation]:
        """Read the session until all of these have ended.

        Raises:
            TimeoutError: If they have not ended in time.
        """
        self.wait_until(lambda: all(generation.end is not None for generation in generations), timeout_s)
        return list(generations)

    def wait_until(self, is_done: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Read the session until a condition holds.

        Raises:
            TimeoutError: If it does not hold in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not is_done():
            left_s = deadline_s - time.monotonic()
            outputs = self.outbox.wait(left_s)
            if outputs is not None:
                self.take(outputs)
            elif left_s <= 0:
                open_ones = [slot for slot, generation in self.generations.items() if generation.end is None]
                raise TimeoutError(f"requests {open_ones} have not ended, {self.engine.snapshot()}, {self.crashes}")

    def generate(self, prompts: Sequence[Sequence[int]], **fields: object) -> list[list[int]]:
        """Run prompts together and return their output tokens; every request must end without an error."""
        done = self.wait([self.submit(prompt, **fields) for prompt in prompts])  # type: ignore[arg-type]
        for generation in done:
            assert generation.end is not None
            if generation.end.error is not None:
                raise generation.end.error
        return [generation.tokens for generation in done]

    def take(self, outputs: StepOutputs) -> None:
        """Pass outputs on to their requests."""
        for slot, position, token_id in zip(
            outputs.token_slots.tolist(), outputs.token_positions.tolist(), outputs.token_ids.tolist(), strict=True
        ):
            assert position == self.generations[slot].next_position
            self.generations[slot].tokens.append(token_id)
        for event in outputs.events:
            generation = self.generations[event.session_slot]
            assert generation.end is None, f"{event} after the end"
            match event:
                case TokenWithLogprobs():
                    assert event.position == generation.next_position
                    generation.tokens.append(event.token_id)
                    generation.logprobs.append(event.logprobs)
                case Started():
                    generation.start = event
                case Loading():
                    generation.num_loading += 1
                case Ended():
                    generation.end = event

    def check_idle(self) -> None:
        """Check that no request, page or lease is left over; resident adapters may stay."""
        for _ in range(2):  # once the second turn has begun, the first one's load is published
            self.engine.check_integrity().result(WAIT_S)
        load = self.engine.snapshot()
        assert (load.running, load.waiting, load.pages_kv) == (0, 0, 0), load
        assert load.pages_free + load.pages_adapter + load.pages_pinned == load.pages_total, load

    def close(self) -> None:
        """Close session and engine."""
        self.engine.post(CloseSession(self.outbox.session_id))
        self.engine.close()


class _Store:
    """Answers wants from a dict, on the loop's thread."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.images: dict[str, tuple[AdapterSpec, NDArray[np.uint8]]] = {}
        self.events: list[StoreEvent] = []
        self.is_silent = threading.Event()

    def on_event(self, event: StoreEvent) -> None:
        self.events.append(event)
        if isinstance(event, WantImage) and self.engine is not None:
            self._answer(self.engine, event.digest)

    def _answer(self, engine: Engine, digest: str) -> None:
        if digest not in self.images:
            engine.post(ImageRefused(digest, AdapterNotFoundError(f"no adapter {digest}")))
            return
        spec, image = self.images[digest]

        def fill(granted: Future[tuple[int, ...] | None]) -> None:
            slots = granted.result()
            if slots is not None:
                engine.arena.view[list(slots)] = image
                engine.post(ImageArrived(spec, slots))

        engine.grant_slots(digest, len(image), is_wanted=True).add_done_callback(fill)


@contextmanager
def running_engine(
    limits: EngineLimits, runner_factory: RunnerFactory, filler: MaskFiller | None = None
) -> Iterator[EngineHarness]:
    """Run an engine until the block ends."""
    store, crashes = _Store(), list[BaseException]()
    engine = Engine(limits, runner_factory, on_store_event=store.on_event, on_crash=crashes.append, filler=filler)
    store.engine = engine
    harness = EngineHarness(engine, store.images, crashes, store.events)
    try:
        yield harness
    finally:
        harness.close()


FAKE_PAGE_BYTES = 128


def fake_limits(*, block_tokens: int = 4, **fields: int) -> EngineLimits:
    """Return sizes for a `FakeRunner`: 32 pages of 4 tokens; every field can be replaced."""
    sizes = {"num_pages": 32, "num_arena_slots": 32, "max_model_len": 64, **fields}
    pool = fake_pool(block_tokens, FAKE_PAGE_BYTES)
    return EngineLimits(pool=pool, eos_token_ids=(7,), numerics="fp32", policy=NO_GROWTH, **sizes)


@contextmanager
def fake_engine(
    *,
    depth: int = 1,
    loads_at_once: bool = True,
    step_patience_s: float | None = None,
    filler: MaskFiller | None = None,
    **fields: int,
) -> Iterator[tuple[EngineHarness, FakeRunner]]:
    """Run an engine on a `FakeRunner`."""
    runners = []

    def make(limits: EngineLimits) -> FakeRunner:
        runners.append(
            FakeRunner(
                num_pages=limits.num_pages,
                page_bytes=limits.page_bytes,
                block_tokens=limits.block_tokens,
                pipeline_depth=depth,
                loads_at_once=loads_at_once,
                max_num_batched_tokens=limits.max_num_batched_tokens,
            )
        )
        return runners[0]

    limits = replace(fake_limits(**fields), step_patience_s=step_patience_s)
    with running_engine(limits, make, filler) as harness:
        yield harness, runners[0]


def add_fake_adapter(harness: EngineHarness, digest: str, num_pages: int = 1) -> None:
    """Give the store an image for a `FakeRunner`."""
    harness.images[digest] = (fake_spec(digest), fake_image(digest, num_pages, FAKE_PAGE_BYTES))


def recipe_adapter(info: BaseModelInfo, recipe: Recipe, digest: str) -> tuple[AdapterSpec, Tensors]:
    """Return spec and tensors of a recipe's adapter, as the store would read them from its files."""
    files = adapter_tensors(info, recipe)
    modules, tensors = [], {}

    for layer in range(info.num_layers):
        for projection in PROJECTIONS:
            name = module_name(layer, projection)
            key = f"base_model.model.{name}.lora_A.weight"
            if key in files:
                a, b = files[key], files[key.replace("lora_A", "lora_B")]
                modules.append(ModuleSpec.low_rank(layer, projection, a.shape[0], recipe.scaling_of(name)))
                tensors[layer, projection] = (a, b)
    return AdapterSpec(digest, tuple(modules)), pair_tensors(tensors)


@contextmanager
def torch_engine(
    model_dir: Path,
    *,
    num_pages: int = 256,
    num_arena_slots: int = 256,
    block_tokens: int | None = None,
    max_model_len: int = 256,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 256,
    max_added_tokens: int = MAX_ADDED_TOKENS,
    emulate_async: bool = False,
    eos_token_ids: tuple[int, ...] = (),
    policy: SchedulingPolicy = NO_GROWTH,
    filler: MaskFiller | None = None,
    kv_dtype: str = "",
) -> Iterator[EngineHarness]:
    """Run an engine on the torch backend in fp32 on the CPU; a small ``block_tokens`` makes small pages."""
    import torch
    from loraplex_engine.model.weights import WeightReader
    from loraplex_engine.pool_geometry import choose_pool_geometry
    from loraplex_engine.runners.runner_config import RunnerConfig
    from loraplex_engine.runners.torch.runner import TorchRunner

    info = load_base_model(model_dir)
    pool = choose_pool_geometry(info, dtype="float32", kv_dtype=kv_dtype)
    if block_tokens is not None:
        pool = replace(pool, block_tokens=block_tokens)
    limits = EngineLimits(
        pool=pool,
        num_pages=num_pages,
        num_arena_slots=num_arena_slots,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_added_tokens=max_added_tokens,
        policy=policy,
    )

    def make(limits: EngineLimits) -> TorchRunner:
        return TorchRunner(
            RunnerConfig(info=info, limits=limits, emulate_async=emulate_async),
            WeightReader(model_dir, dtype=torch.float32, device=torch.device("cpu")),
        )

    with running_engine(limits, make, filler) as harness:
        yield harness
