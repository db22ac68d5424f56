"""Ten thousand random operations on scheduler and real model, one thread, turn by turn: no token is ever wrong.

Requests come, resume and are cancelled; names move to other revisions; images arrive, are dropped, refused and come
again; adapters are pinned, evicted and prefetched; the pool is too small for any of it, so requests are preempted and
blocks and adapters evicted all the time. Every stream is compared token by token with what its request says alone.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterNotFoundError, LoraplexError
from loraplex_engine.limits import EngineLimits
from loraplex_engine.messages import FinishReason, Priority, ResidencyState
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from support.adapters import Recipe
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter
from support.scheduler_rig import Client, Images, Rig, make_submission

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_NAMES = 5
NUM_REVISIONS = 2
MAX_OPEN = 14
NEW_TOKENS = 24
NUM_PAGES = 40
NUM_ARENA_SLOTS = 60
MAX_MODEL_LEN = 128
BEGINNING = tuple(range(30, 62))
PROMPTS = ((5, 6, 7), tuple(range(40, 60)), BEGINNING, (*BEGINNING, 9, 8), (*BEGINNING, *range(100, 130)))
WEIGHTS = {
    "submit": 30,
    "cancel": 8,
    "turn": 40,
    "move_name": 3,
    "drop": 3,
    "evict": 4,
    "pin": 2,
    "unpin": 3,
    "deliver": 12,
    "prefetch": 3,
    "refuse": 4,
}


class Model:
    """A tiny model, its adapters' images, and runners over pools of any size."""

    def __init__(self, directory: Path) -> None:
        self.directory = write_base_model(directory, TinyBase())
        self.info = load_base_model(self.directory)
        self.geometry = choose_pool_geometry(self.info, dtype="float32")
        geometry = self.info.geometry(dtype="float32", page_bytes=self.geometry.page_bytes)
        self.images: Images = {}
        for number in range(NUM_NAMES * NUM_REVISIONS):
            recipe = Recipe(rank=2 + number, seed=number)
            if number == 1:
                recipe = Recipe(rank=4, seed=1, targets=("down_proj",), layers=(0,))
            spec, tensors = recipe_adapter(self.info, recipe, f"revision-{number}")
            self.images[spec.digest] = (spec, pack(geometry, spec, tensors))

    def rig(self, *, num_pages: int, num_arena_slots: int, emulate_async: bool, **fields: object) -> Rig:
        limits = EngineLimits(pool=self.geometry, num_pages=num_pages, max_num_seqs=8, max_model_len=MAX_MODEL_LEN)
        runner = TorchRunner(
            RunnerConfig(info=self.info, limits=limits, emulate_async=emulate_async),
            WeightReader(self.directory, dtype=torch.float32, device=torch.device("cpu")),
        )
        return Rig(
            pool=self.geometry,
            num_pages=num_pages,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=MAX_MODEL_LEN,
            num_arena_slots=num_arena_slots,
            runner=runner,
            images=self.images,
            step_s=0.005,
            **fields,  # type: ignore[arg-type]
        )


class Chaos:
    """Does random operations and knows what every stream should say."""

    def __init__(self, model: Model, rig: Rig, alone: Callable[[str | None, int], list[int]], seed: int) -> None:
        self.model = model
        self.rig = rig
        self.alone = alone
        self.random = random.Random(seed)
        self.names = {name: f"revision-{NUM_REVISIONS * name}" for name in range(NUM_NAMES)}
        self.open: dict[int, tuple[Client, list[int]]] = {}
        self.next_slot = 0
        self.counts: Counter[str] = Counter()

    def run(self, num_operations: int) -> None:
        """Do the operations, then let everything end."""
        for number in range(num_operations):
            (operation,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            getattr(self, operation)()
            self.counts[operation] += 1
            self.check(is_thorough=number % 50 == 0)
            while len(self.open) >= MAX_OPEN:
                self.progress()
        while self.open:
            self.progress()

    def progress(self) -> None:
        """Let the store answer and the engine take a step."""
        self.deliver()
        self.turn()
        self.check(is_thorough=False)

    def check(self, *, is_thorough: bool) -> None:
        if is_thorough:
            self.rig.check_integrity()
        for slot, (client, expected) in list(self.open.items()):
            assert client.tokens == expected[: len(client.tokens)], f"slot {slot}: {client}"
            if client.end is not None:
                self.ended(client, expected)
                del self.open[slot]

    def ended(self, client: Client, expected: list[int]) -> None:
        assert client.end is not None
        if client.end.finish_reason is FinishReason.LENGTH:
            assert client.tokens == expected
            self.counts["finished"] += 1
            self.counts["finished with a cached prefix"] += client.num_cached > 0
        elif client.end.finish_reason is FinishReason.CANCELLED:
            self.counts["cancelled"] += 1
        else:
            assert isinstance(client.end.error, AdapterNotFoundError), client.end.error
            self.counts["refused"] += 1

    # --- operations ---

    def submit(self) -> None:
        name = self.random.randrange(NUM_NAMES + 1)
        digest = self.names.get(name)  # one in six runs on the base model
        prompt = self.random.randrange(len(PROMPTS))
        expected = self.alone(digest, prompt)
        resumed = expected[: self.random.randrange(1, NEW_TOKENS - 1)] if self.random.random() < 0.1 else []
        submission = make_submission(
            slot=self.next_slot,
            prompt=list(PROMPTS[prompt]),
            resumed=resumed,
            max_new_tokens=NEW_TOKENS,
            adapter=digest,
            fairness_key=str(name),
            priority=self.random.choice(list(Priority)),
            cache_salt=self.random.choice(["", "", "salt"]),
        )
        self.open[self.next_slot] = (self.rig.submit(submission), expected[len(resumed) :])
        self.next_slot += 1

    def cancel(self) -> None:
        if self.open:
            self.rig.scheduler.abort(1, self.random.choice(list(self.open)))
            self.rig.take_outputs()

    def turn(self) -> None:
        self.rig.now_s += 0.01
        self.rig.turn(check=False)

    def move_name(self) -> None:
        name = self.random.randrange(NUM_NAMES)
        self.names[name] = f"revision-{NUM_REVISIONS * name + self.random.randrange(NUM_REVISIONS)}"

    def _digest(self) -> str:
        return self.random.choice(list(self.model.images))

    def drop(self) -> None:
        self.rig.cache.drop(self._digest())

    def _operate(self, operation: str, digest: str) -> None:
        with contextlib.suppress(LoraplexError):  # not held, pinned, or too much to pin
            getattr(self.rig.operations, operation)(digest)
            self.counts[f"did {operation}"] += 1

    def evict(self) -> None:
        self._operate("evict", self._digest())

    def pin(self) -> None:
        digest = self._digest()
        if len(self.model.images[digest][1]) <= 6:  # what is pinned must leave room for every request
            self._operate("pin", digest)

    def unpin(self) -> None:
        for digest in self.model.images:
            self._operate("unpin", digest)

    def deliver(self) -> None:
        for digest in self.rig.wanted:
            self.rig.deliver(digest, len(self.model.images[digest][1]))

    def prefetch(self) -> None:
        digest = self._digest()
        if self.rig.cache.state_of(digest) is ResidencyState.ABSENT and digest not in self.rig.grants_asked:
            self.rig.deliver(digest, len(self.model.images[digest][1]), is_wanted=False)

    def refuse(self) -> None:
        wanted = [digest for digest in self.rig.wanted if digest not in self.rig.grants_asked]
        if wanted:
            self.rig.refuse(self.random.choice(wanted))
            self.rig.take_outputs()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("chaos") / "tiny")


def make_alone(model: Model) -> Callable[[str | None, int], list[int]]:
    """Return what tells a request's tokens when it runs alone, in a roomy pool that shares nothing."""
    rig = model.rig(num_pages=256, num_arena_slots=256, emulate_async=False, enable_prefix_cache=False)
    known: dict[tuple[str | None, int], list[int]] = {}

    def alone(digest: str | None, prompt: int) -> list[int]:
        if (digest, prompt) not in known:
            submission = make_submission(prompt=list(PROMPTS[prompt]), max_new_tokens=NEW_TOKENS, adapter=digest)
            client = rig.submit(replace(submission, session_slot=len(known)))
            while client.end is None:
                for wanted in rig.wanted:
                    rig.deliver(wanted, len(model.images[wanted][1]))
                rig.turn(check=False)
            known[digest, prompt] = client.tokens
        return known[digest, prompt]

    return alone


@pytest.mark.parametrize(
    ("num_operations", "emulate_async"), [(10_000, True), (2_500, False)], ids=["overlapped", "at-once"]
)
def test_in_thousands_of_random_operations_no_token_is_wrong_and_nothing_is_left(
    model: Model, num_operations: int, emulate_async: bool
) -> None:
    rig = model.rig(num_pages=NUM_PAGES, num_arena_slots=NUM_ARENA_SLOTS, emulate_async=emulate_async)
    chaos = Chaos(model, rig, make_alone(model), seed=20_250 + emulate_async)

    chaos.run(num_operations)

    while rig.turn() or rig.loads:
        pass
    rig.check_finished()
    counters, counts, share = rig.scheduler.counters, chaos.counts, num_operations / 10_000
    assert counts["finished"] > 500 * share, counts
    assert counts["finished with a cached prefix"] > 100 * share, counts
    assert counts["cancelled"] > 100 * share, counts
    assert counts["refused"] > 5 * share, counts
    assert min(counts[f"did {operation}"] for operation in ("evict", "pin", "unpin")) > 20 * share, counts
    assert counters.num_preemptions > 10 * share, counters
    assert rig.scheduler.prefix.num_evicted > 500 * share
