"""A scheduler, its resources and a fake runner in one thread, turn by turn, with a store that answers when told to."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec
from loraplex_common.errors import AdapterNotFoundError, LoraplexError
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.constraints.output_rules import fill_masks
from loraplex_engine.limits import EngineLimits, SchedulingPolicy
from loraplex_engine.loop.adapter_operations import AdapterOperations
from loraplex_engine.loop.engine_state import EngineState
from loraplex_engine.messages import (
    Ended,
    FinishReason,
    PromptLogprobs,
    ResidencyChanged,
    ResidencyState,
    Started,
    StepOutputs,
    StoreEvent,
    Submission,
    TokenWithLogprobs,
    WantImage,
)
from loraplex_engine.sampling_params import SamplingParams, StoppingParams
from numpy.typing import NDArray
from support.constraints import StrideFiller
from support.fake_adapters import fake_image, fake_pool, fake_spec
from support.fake_runner import VOCAB_SIZE, FakeRunner, draw

if TYPE_CHECKING:
    from loraplex_engine.model_runner import LoadHandle, ModelRunner, StepHandle
    from loraplex_engine.pool_geometry import PoolGeometry

PAGE_BYTES = 64
Images = dict[str, tuple[AdapterSpec, NDArray[np.uint8]]]
EOS = 7


def make_submission(
    *,
    slot: int = 0,
    prompt: list[int] | None = None,
    max_new_tokens: int | None = 8,
    adapter: str | None = None,
    session_id: int = 1,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = True,
    min_new_tokens: int = 0,
    resumed: list[int] | None = None,
    sampling: SamplingParams | None = None,
    **keywords: object,
) -> Submission:
    """Return a greedy request of four prompt tokens; every field can be replaced."""
    submission = Submission(
        session_id=session_id,
        session_slot=slot,
        request_id=f"request-{slot}",
        prompt_token_ids=np.array(prompt if prompt is not None else [1, 2, 3, 4], dtype=np.int32),
        resumed_token_ids=np.array(resumed or [], dtype=np.int32),
        sampling=sampling or SamplingParams(),
        stopping=StoppingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        ),
        adapter_digest=adapter,
    )
    return replace(submission, **keywords)  # type: ignore[arg-type]


def solo(submission: Submission, max_outputs: int, eos: tuple[int, ...] = (EOS,)) -> list[int]:
    """Return the new tokens of a request that runs alone."""
    stopping = submission.stopping
    stops = stopping.stop_token_ids + (() if stopping.ignore_eos else eos)
    prompt: list[int] = submission.prompt_token_ids.tolist()
    outputs: list[int] = submission.resumed_token_ids.tolist()
    num_resumed = len(outputs)
    while len(outputs) < max_outputs:
        banned = stops if len(outputs) < stopping.min_new_tokens else ()
        adapters = tuple((term.digest, term.scale) for term in submission.adapters)
        tokens = np.array(prompt + outputs, dtype=np.int32)
        token = draw(tokens, adapters, submission.sampling.seed, banned)
        outputs.append(token)
        if token in stops and not banned:
            break
    return outputs[num_resumed:]


@dataclass
class Client:
    """The outputs that one request's gateway saw; checks their order as they come."""

    submission: Submission
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)
    num_started: int = 0
    num_cached: int = 0
    end: Ended | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """The finish reason of the request, which must have ended without an error."""
        assert self.end is not None, f"not at its end: {self}"
        return self.end.finish_reason

    @property
    def error(self) -> LoraplexError | None:
        """The error of the request, which must have ended with one."""
        assert self.end is not None, f"not at its end: {self}"
        return self.end.error

    def token(self, position: int, token_id: int) -> None:
        """Take a token; positions have no gap and none comes after the end."""
        assert self.end is None, f"a token after the end: {self}"
        assert self.num_started == 1, f"a token before the start: {self}"
        assert position == len(self.submission.resumed_token_ids) + len(self.tokens), f"position {position}: {self}"
        self.tokens.append(token_id)

    def event(self, event: object) -> None:
        """Take any other event."""
        assert self.end is None, f"{event} after the end: {self}"
        match event:
            case Started():
                self.num_started += 1
                self.num_cached = event.cached_tokens
                assert self.num_started == 1
            case TokenWithLogprobs():
                assert event.logprobs.token_ids[0] == event.token_id
                self.token(event.position, event.token_id)
            case PromptLogprobs():
                assert not self.tokens, "prompt probabilities after a token"
                assert event.first == len(self.prompt_logprobs) + 1
                self.prompt_logprobs.extend(int(entry.token_ids[0]) for entry in event.entries)
            case Ended():
                self.end = event


class Rig:
    """Drives a `Scheduler` as `EngineLoop` does, but one `turn` at a time and on a clock of its own.

    Admission expects no growth unless told otherwise, so that small pools come under pressure. A step takes ``step_s``
    and ``token_s`` for each token of a prefill. ``runner``, ``images`` and ``pool`` replace the fake
    ones.
    """

    def __init__(
        self,
        *,
        num_pages: int = 16,
        block_tokens: int = 4,
        pool: PoolGeometry | None = None,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        max_pass_over_s: float = 1.0,
        num_arena_slots: int = 32,
        max_resident_adapters: int = 64,
        depth: int = 1,
        loads_at_once: bool = True,
        growth_quantile: float = 0.0,
        step_s: float = 0.0,
        token_s: float = 0.0,
        runner: ModelRunner | None = None,
        images: Images | None = None,
        **policy: object,
    ) -> None:
        self.now_s = 100.0
        self.step_s = step_s
        self.token_s = token_s
        limits = EngineLimits(
            pool=pool or fake_pool(block_tokens, PAGE_BYTES),
            num_pages=num_pages,
            num_arena_slots=num_arena_slots,
            max_resident_adapters=max_resident_adapters,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_pass_over_s=max_pass_over_s,
            eos_token_ids=(EOS,),
            policy=SchedulingPolicy(growth_quantile=growth_quantile, **policy),  # type: ignore[arg-type]
        )
        self.arena = HostArena(num_arena_slots, limits.page_bytes)
        self._images = images or {}
        weakref.finalize(self, self.arena.close)
        self.store_events: list[StoreEvent] = []
        state = self._state = EngineState(limits, self.arena, emit=self.store_events.append, clock=self.clock)
        self.pool, self.cache, self.scheduler, self.grants = state.pool, state.cache, state.scheduler, state.grants
        self.operations = AdapterOperations(cache=self.cache, pool=self.pool)
        self.runner: FakeRunner = runner or FakeRunner(  # type: ignore[assignment]
            num_pages=num_pages,
            page_bytes=limits.page_bytes,
            block_tokens=limits.block_tokens,
            pipeline_depth=depth,
            loads_at_once=loads_at_once,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.steps: deque[StepHandle] = deque()
        self.awaits_masks = False
        self.filler = StrideFiller(VOCAB_SIZE)
        self.loads: dict[str, LoadHandle] = {}
        self.clients: dict[tuple[int, int], Client] = {}
        self.all_clients: list[Client] = []
        self.grants_asked: dict[str, Future[tuple[int, ...] | None]] = {}

    def clock(self) -> float:
        """Return the rig's time."""
        return self.now_s

    # --- requests ---

    def submit(self, submission: Submission) -> Client:
        """Submit a request and return what its client sees."""
        client = Client(submission)
        self.clients[submission.session_id, submission.session_slot] = client
        self.all_clients.append(client)
        self.scheduler.submit(submission)
        return client

    def take_outputs(self) -> None:
        """Pass outputs on to the clients, in the order that messages.py promises."""
        for session_id, outputs in self.scheduler.take_outputs().items():
            self._deliver(session_id, outputs)

    def _deliver(self, session_id: int, outputs: StepOutputs) -> None:
        late = (TokenWithLogprobs, Ended)
        for event in outputs.events:
            if not isinstance(event, late):
                self.clients[session_id, event.session_slot].event(event)
        for slot, position, token_id in zip(
            outputs.token_slots.tolist(), outputs.token_positions.tolist(), outputs.token_ids.tolist(), strict=True
        ):
            self.clients[session_id, slot].token(position, token_id)
        for event in outputs.events:
            if isinstance(event, late):
                self.clients[session_id, event.session_slot].event(event)

    @property
    def running_slots(self) -> list[int]:
        """Session slots of the requests in the batch, in order of admission."""
        return [request.submission.session_slot for request in self.scheduler.batch.requests]

    # --- the store ---

    @property
    def wanted(self) -> list[str]:
        """Digests that are WANTED now."""
        return [s.digest for s in self.cache.states.statuses() if s.state is ResidencyState.WANTED]

    @property
    def num_wants(self) -> int:
        """Number of images ever asked for."""
        return sum(isinstance(event, WantImage) for event in self.store_events)

    def states_of(self, digest: str) -> list[ResidencyState]:
        """Return the states that an adapter went through."""
        return [e.state for e in self.store_events if isinstance(e, ResidencyChanged) and e.digest == digest]

    def deliver(self, digest: str, num_pages: int = 1, *, is_wanted: bool = True) -> bool:
        """Offer an image as the store does; False while there is no room in the arena for it."""
        future = self.grants_asked.get(digest)
        if future is None:
            future = self.grants_asked[digest] = Future()
            self.grants.ask(digest, num_pages, is_wanted=is_wanted, future=future)
        self.grants.serve()
        if not future.done():
            return False
        del self.grants_asked[digest]
        slots = future.result()
        if slots is None:
            return False
        spec, image = self._images.get(digest) or (fake_spec(digest), fake_image(digest, num_pages, PAGE_BYTES))
        self.arena.view[list(slots)] = image
        self.scheduler.image_arrived(spec, slots)
        return True

    def refuse(self, digest: str, error: LoraplexError | None = None) -> None:
        """Refuse a want as the store does."""
        self.scheduler.image_refused(digest, error or AdapterNotFoundError(f"no {digest}"))

    # --- steps ---

    def turn(self, *, check: bool = True) -> bool:
        """Do what `EngineLoop` does in one turn; False if there was no step to launch or to wait for."""
        for digest in [digest for digest, load in self.loads.items() if load.is_done()]:
            del self.loads[digest]
            self.cache.load_finished(digest)
        plan = self.scheduler.schedule()
        self.grants.serve()
        for index in self.cache.loads.take_unloads():
            self.runner.unload_adapter(index)
        for load in self.cache.loads.take_loads():
            source = self.arena.pages(load.arena_slots)
            self.loads[load.digest] = self.runner.load_adapter(load.index, load.spec, load.pages, source)
        if plan is not None:
            self.steps.append(self.runner.launch(plan))
            self.now_s += self.step_s + self.token_s * int(plan.num_tokens[plan.num_decode_rows :].sum())
            self.awaits_masks = len(plan.masked) > 0
        has_step = bool(self.steps)
        if has_step and (plan is None or len(self.steps) >= self.runner.pipeline_depth):
            self._draw()
            self.scheduler.update(self.steps.popleft().wait())
        self._draw()
        self.take_outputs()
        if check:
            self.check_integrity()
        return has_step

    def _draw(self) -> None:
        if self.awaits_masks and len(self.steps) == 1:
            fill_masks(self.scheduler.rules(), self.steps[0].masks, self.filler)
            self.steps[0].draw()
            self.awaits_masks = False

    def run(self, *, max_turns: int = 2000) -> None:
        """Turn until nothing is left to do, finishing loads as they come."""
        for _ in range(max_turns):
            has_loads = bool(self.loads)
            for adapter in list(self.runner.loading):
                self.runner.finish_load(adapter)
            if not self.turn() and not has_loads and not self.loads:
                return
        raise AssertionError(f"not done after {max_turns} turns: {self.scheduler.num_open} requests are open")

    def check_integrity(self) -> None:
        """Check every account."""
        self._state.check_integrity()
        held = sum(status.num_pages for status in self.cache.states.statuses() if status.is_in_arena)
        assert held + self.arena.num_free + self._num_granted() == self.arena.num_slots

    def _num_granted(self) -> int:
        futures = [f for f in self.grants_asked.values() if f.done() and not f.cancelled()]
        return sum(len(future.result() or ()) for future in futures)

    def check_finished(self) -> None:
        """Check that every request has ended and every page is free, cached or a resident adapter's."""
        assert self.scheduler.num_open == 0
        assert all(client.end is not None for client in self.all_clients)
        assert not self.steps
        resident = sum(s.num_pages for s in self.cache.states.statuses() if s.state is ResidencyState.RESIDENT)
        assert self.pool.num_free + self.pool.num_cached + resident == self.pool.num_pages
        assert all(status.num_leases == 0 for status in self.cache.states.statuses())
