"""Adapters of every kind in the whole engine: mixed, evicted and preempted equals alone; what they cannot do is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import InvalidParameterError, SaturatedError
from loraplex_engine.runners.torch.factors import FactorWriter
from support.base_models import TinyBase, write_base_model
from support.engine_harness import EngineHarness, torch_engine
from support.peft_parts import TUNERS, PeftTruth

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from support.engine_harness import Generation

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"), TinyBase(architecture="qwen2"))


@pytest.fixture(scope="module")
def truth(base_dir: Path) -> PeftTruth:
    return PeftTruth(base_dir, TUNERS, seed=11)


@pytest.fixture(scope="module")
def digests(truth: PeftTruth) -> dict[str, str]:
    """By tuner, the adapter's digest."""
    return {name.partition("-")[0]: tuned.spec.digest for name, tuned in truth.tuned.items()}


def add_adapters(harness: EngineHarness, truth: PeftTruth) -> None:
    for tuned in truth.tuned.values():
        harness.add_adapter(tuned.spec, tuned.tensors)


def prompt(length: int) -> list[int]:
    return [(7 * index + length) % 60 + 4 for index in range(length)]


@pytest.fixture(scope="module")
def alone(base_dir: Path, truth: PeftTruth) -> dict[tuple[str | None, int], list[int]]:
    """Outputs of each prompt with each adapter, one request at a time in a roomy engine."""
    with torch_engine(base_dir) as harness:
        add_adapters(harness, truth)
        return {
            (digest, length): harness.generate([prompt(length)], adapter=digest, max_new_tokens=NUM_TOKENS)[0]
            for digest in (None, *(tuned.spec.digest for tuned in truth.tuned.values()))
            for length in (3, 30)
        }


@pytest.mark.parametrize("emulate_async", [False, True], ids=["depth1", "depth2"])
def test_every_kind_among_strangers_evicted_and_preempted_equals_alone(
    base_dir: Path, truth: PeftTruth, alone: dict[tuple[str | None, int], list[int]], *, emulate_async: bool
) -> None:
    with torch_engine(base_dir, block_tokens=4) as probe:
        add_adapters(probe, truth)
        num_pages = max(len(image) for _, image in probe.images.values()) + 24

    with torch_engine(
        base_dir,
        num_pages=num_pages,
        num_arena_slots=4000,
        block_tokens=4,
        emulate_async=emulate_async,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    ) as harness:
        add_adapters(harness, truth)
        jobs = [key for _ in range(2) for key in alone]
        generations = [
            harness.submit(prompt(length), adapter=digest, max_new_tokens=NUM_TOKENS) for digest, length in jobs
        ]
        harness.wait(generations)

        digests = {digest for digest, _ in alone}
        assert len({(*alone[digest, 3], *alone[digest, 30]) for digest in digests}) == 1 + len(TUNERS)
        assert [generation.tokens for generation in generations] == [alone[job] for job in jobs]
        assert harness.engine.counters.num_preemptions > 0, "the case is too easy"
        harness.check_idle()


def refusal_of(generation: Generation) -> InvalidParameterError:
    assert generation.end is not None
    assert isinstance(generation.end.error, InvalidParameterError), generation.end
    return generation.end.error


@pytest.mark.parametrize("tuner", ["dora", "ia3", "flora"])
def test_a_scale_on_an_adapter_that_multiplies_is_refused_by_name_and_alone(
    base_dir: Path, truth: PeftTruth, digests: dict[str, str], tuner: str
) -> None:
    with torch_engine(base_dir) as harness:
        add_adapters(harness, truth)
        digest = digests[tuner]
        before = harness.submit(prompt(5), adapter=digest, adapter_scale=0.5)
        plain = harness.submit(prompt(5), adapter=digest, max_new_tokens=4)
        harness.wait([before, plain])
        after = harness.submit(prompt(5), adapter=digest, adapter_scale=2.0)
        beside = harness.submit(prompt(5), adapter=digest, adapter_scale=1.0, max_new_tokens=4)
        harness.wait([after, beside])

        assert refusal_of(before).message.startswith(
            f"adapter_scale: 0.5 cannot be applied to adapter {digest}: in layer "
        )
        assert refusal_of(after).field == "adapter_scale"
        assert "leave adapter_scale out" in refusal_of(after).message
        assert before.tokens == after.tokens == []
        assert plain.tokens == beside.tokens
        assert len(plain.tokens) == 4
        harness.check_idle()


@pytest.mark.parametrize("tuner", ["lora", "lora_bias", "shira"])
def test_a_scale_of_zero_makes_an_adapter_that_only_adds_the_base_model(
    base_dir: Path, truth: PeftTruth, digests: dict[str, str], tuner: str
) -> None:
    with torch_engine(base_dir) as harness:
        add_adapters(harness, truth)

        scaled, base = (
            harness.submit(prompt(9), adapter=digest, adapter_scale=scale)
            for digest, scale in ((digests[tuner], 0.0), (None, 1.0))
        )
        harness.wait([scaled, base])

        assert scaled.end is not None
        assert scaled.end.error is None
        assert scaled.tokens == base.tokens


def test_factors_that_cannot_be_computed_end_the_adapters_requests_alone(
    base_dir: Path, truth: PeftTruth, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failures = FactorWriter.write, [MemoryError("no memory")]

    def failing(self: FactorWriter, digest: str, table: AdapterTable) -> None:
        if failures:
            raise failures.pop()
        write(self, digest, table)

    monkeypatch.setattr(FactorWriter, "write", failing)
    dora = digests["dora"]
    with torch_engine(base_dir) as harness:
        add_adapters(harness, truth)
        base = harness.submit(prompt(30), max_new_tokens=NUM_TOKENS)
        refused = [harness.submit(prompt(length), adapter=dora, max_new_tokens=NUM_TOKENS) for length in (3, 30)]
        harness.wait([base, *refused])
        again = harness.generate([prompt(30)], adapter=dora, max_new_tokens=NUM_TOKENS)
        harness.check_idle()

    assert base.end is not None
    assert base.end.error is None
    for generation in refused:
        assert generation.end is not None
        assert isinstance(generation.end.error, SaturatedError)
        assert "its DoRA factors could not be computed: no memory" in str(generation.end.error)
    assert len(again[0]) == NUM_TOKENS, "the next request loads it again"
