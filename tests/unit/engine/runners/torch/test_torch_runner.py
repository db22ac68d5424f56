"""TorchRunner keeps the contract of step.py: order of plans and loads, feeding on the device, one row's failure its own."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import load_base_model
from loraplex_engine.step import SlotSetup
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.oracle import adapter_image, make_rig
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.model_runner import StepHandle

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("runner")
    model_dir = write_base_model(folder / "base", TinyBase())
    adapters = {name: write_adapter(folder / name, model_dir, Recipe(rank=4, seed=i)) for i, name in enumerate("ab")}
    return model_dir, adapters


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 384, int(rng.integers(3, 40))).tolist() for _ in range(count)]


def drive_overlapped(harness: Harness, sequences: list[Sequence_], num_tokens: int) -> None:
    """Keep two plans in flight, as the step loop does with a runner of depth 2."""
    in_flight: list[StepHandle] = []
    for _ in range(num_tokens):
        in_flight.append(harness.runner.launch(harness.plan(sequences)))
        if len(in_flight) == 2:
            harness.absorb(sequences, in_flight.pop(0).wait())
    harness.absorb(sequences, in_flight.pop().wait())


def test_two_plans_in_flight_draw_what_one_at_a_time_draws(world: tuple[Path, dict[str, Path]]) -> None:
    one, two = make_rig(*world), make_rig(*world, emulate_async=True)
    assert (one.runner.pipeline_depth, two.runner.pipeline_depth) == (1, 2)
    drawn = []

    for rig in (one, two):
        sequences = [rig.harness.add(prompt, adapter=i % 3 - 1) for i, prompt in enumerate(prompts(6))]
        if rig is one:
            rig.harness.generate(sequences, NUM_TOKENS)
        else:
            drive_overlapped(rig.harness, sequences, NUM_TOKENS)
        drawn.append([sequence.drawn for sequence in sequences])
        rig.runner.close()

    assert drawn[0] == drawn[1]


def test_a_launched_step_is_computed_when_a_later_one_is_waited_for_and_not_before(
    world: tuple[Path, dict[str, Path]],
) -> None:
    rig = make_rig(*world, emulate_async=True)
    first, second = (rig.harness.add(prompt) for prompt in prompts(2))

    one = rig.runner.launch(rig.harness.plan([first]))
    two = rig.runner.launch(rig.harness.plan([second]))

    assert not one.is_done()
    two.wait()
    assert one.is_done()
    rig.runner.close()


def test_an_adapter_is_copied_only_after_launched_steps_have_read_its_pages(
    world: tuple[Path, dict[str, Path]],
) -> None:
    model_dir, adapters = world
    rig = make_rig(model_dir, emulate_async=True)
    sequence = rig.harness.add(prompts(1)[0])
    rig.harness.step([sequence])
    step = rig.runner.launch(rig.harness.plan([sequence]))
    spec, image = adapter_image(rig.runner.geometry, load_base_model(model_dir), adapters["a"])
    pages = np.array([*sequence.pages, *rig.harness.free[: len(image)]][: len(image)], dtype=np.int32)

    load = rig.runner.load_adapter(0, spec, pages, image)
    done = threading.Event()
    load.add_done_callback(done.set)

    assert not load.is_done()
    rig.harness.absorb([sequence], step.wait())
    assert done.wait(10)
    assert load.is_done()
    undisturbed = make_rig(model_dir)
    expected = undisturbed.harness.generate([undisturbed.harness.add(sequence.prompt)], 2)
    assert [sequence.drawn] == expected
    rig.runner.close()
    undisturbed.runner.close()


def test_an_index_can_be_bound_again_after_unloading(world: tuple[Path, dict[str, Path]]) -> None:
    model_dir, adapters = world
    rig = make_rig(model_dir, adapters)
    prompt = prompts(1)[0]
    with_a, with_b = rig.harness.generate(
        [rig.harness.add(prompt, adapter=rig.adapters[name]) for name in "ab"], NUM_TOKENS
    )
    spec, image = adapter_image(rig.runner.geometry, load_base_model(model_dir), adapters["b"])
    pages = np.array([rig.harness.free.pop() for _ in image], dtype=np.int32)

    with pytest.raises(RuntimeError, match="in use"):
        rig.runner.load_adapter(rig.adapters["a"], spec, pages, image)
    rig.runner.unload_adapter(rig.adapters["a"])
    done = threading.Event()
    rig.runner.load_adapter(rig.adapters["a"], spec, pages, image).add_done_callback(done.set)
    assert done.wait(10)
    again = rig.harness.generate([rig.harness.add(prompt, adapter=rig.adapters["a"])], NUM_TOKENS)[0]

    assert with_a != with_b
    assert again == with_b
    rig.runner.close()


def test_a_broken_adapter_fails_its_own_requests_and_leaves_no_trace_in_reused_pages(
    world: tuple[Path, dict[str, Path]],
) -> None:
    model_dir, adapters = world
    rig = make_rig(model_dir, adapters, num_pages=64)
    spec, image = adapter_image(rig.runner.geometry, load_base_model(model_dir), adapters["a"])
    broken = rig.harness.load(spec, np.full_like(image, 0xFF))  # all bits set is NaN
    healthy, sick = rig.harness.add(prompts(1)[0]), rig.harness.add(prompts(1)[0], adapter=broken)

    together = rig.harness.generate([healthy, sick], NUM_TOKENS)
    expected = together[0]
    rig.harness.free = list(sick.pages)
    reused = rig.harness.add(prompts(1)[0])
    again = rig.harness.generate([reused], NUM_TOKENS)[0]

    assert healthy.failure is None
    assert sick.failure is not None
    assert "logits are not finite" in sick.failure
    assert reused.failure is None
    assert again == expected
    rig.runner.close()


def test_a_slot_forgets_its_former_occupants_constraints(world: tuple[Path, dict[str, Path]]) -> None:
    rig = make_rig(*world)
    prompt = prompts(1)[0]
    empty = np.empty(0, np.int32)
    setup = SlotSetup(slot=0, prompt_token_ids=empty, output_token_ids=empty, allowed_token_ids=(7,))
    bound, free = rig.harness.add(prompt, setup=setup), rig.harness.add(prompt)

    constrained, expected = rig.harness.generate([bound, free], NUM_TOKENS)
    successor = Sequence_(slot=bound.slot, prompt=prompt)
    unconstrained = rig.harness.generate([successor], NUM_TOKENS)[0]

    assert constrained == [7] * NUM_TOKENS
    assert unconstrained == expected
    rig.runner.close()


def test_penalties_continue_across_preemption(world: tuple[Path, dict[str, Path]]) -> None:
    rig = make_rig(*world)
    prompt = prompts(1)[0]
    empty = np.empty(0, np.int32)
    draw = Draw(frequency_penalty=1.5, repetition_penalty=1.3)
    setup = SlotSetup(slot=0, prompt_token_ids=np.array(prompt, np.int32), output_token_ids=empty, uses_penalties=True)
    whole = rig.harness.add(prompt, draw=draw, setup=setup)
    expected = rig.harness.generate([whole], NUM_TOKENS)[0]
    plain = rig.harness.generate([rig.harness.add(prompt)], NUM_TOKENS)[0]

    resumed = rig.harness.add(
        prompt + expected[:5],
        draw=draw,
        setup=replace(setup, output_token_ids=np.array(expected[:5], np.int32)),
    )
    rest = rig.harness.generate([resumed], NUM_TOKENS - 5)[0]

    assert expected != plain
    assert expected[:5] + rest == expected
    rig.runner.close()


def test_prompt_logprobs_do_not_depend_on_chunks(world: tuple[Path, dict[str, Path]]) -> None:
    rig = make_rig(*world)
    prompt = prompts(1, seed=8)[0]
    empty = np.empty(0, np.int32)
    setup = SlotSetup(slot=0, prompt_token_ids=empty, output_token_ids=empty, prompt_logprobs=2)
    whole, cut = (rig.harness.add(prompt, setup=setup, chunks=chunks) for chunks in ([], [1, 1, 5, 3]))

    rig.harness.generate([whole, cut], 1)

    assert len(whole.prompt_logprobs) == len(cut.prompt_logprobs) == len(prompt) - 1
    for position, (one, other) in enumerate(zip(whole.prompt_logprobs, cut.prompt_logprobs, strict=True)):
        assert one.token_ids[0] == prompt[position + 1]
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    rig.runner.close()


def test_bf16_draws_nearly_what_fp32_draws(world: tuple[Path, dict[str, Path]]) -> None:
    wide, narrow = make_rig(*world), make_rig(*world, dtype="bfloat16")
    cases = [(prompt, i % 3 - 1) for i, prompt in enumerate(prompts(12, seed=5))]

    first = [
        rig.harness.generate([rig.harness.add(prompt, adapter=adapter) for prompt, adapter in cases], 1)
        for rig in (wide, narrow)
    ]

    agreeing = sum(one == other for one, other in zip(*first, strict=True))
    assert agreeing >= 10
    wide.runner.close()
    narrow.runner.close()


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws_with_two_plans_in_flight(world: tuple[Path, dict[str, Path]]) -> None:
    on_cpu, on_gpu = make_rig(*world), make_rig(*world, device="cuda")
    assert on_gpu.runner.pipeline_depth == 2
    cases = [(prompt, i % 3 - 1) for i, prompt in enumerate(prompts(9))]
    expected = on_cpu.harness.generate([on_cpu.harness.add(p, adapter=a) for p, a in cases], NUM_TOKENS)

    sequences = [on_gpu.harness.add(prompt, adapter=adapter) for prompt, adapter in cases]
    drive_overlapped(on_gpu.harness, sequences, NUM_TOKENS)

    assert [sequence.drawn for sequence in sequences] == expected
    on_cpu.runner.close()
    on_gpu.runner.close()
