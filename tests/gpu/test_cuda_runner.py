"""The CUDA backend against the torch backend on the same GPU, teacher-forced, and against its own promises of order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda import host_memory
from loraplex_engine.runners.cuda.decode_lora import MAX_ROWS_BESIDE
from loraplex_engine.step import SlotSetup
from support.cuda_rig import (
    BASES,
    RECIPES,
    Agreement,
    CudaRig,
    add_sequences,
    images,
    make_cuda_runner,
    make_rig,
    make_torch_runner,
)
from support.engine_harness import recipe_adapter
from support.plans import Draw, Harness, Sequence_

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.model_runner import StepHandle
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.runner import CudaRunner
    from loraplex_engine.step import StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
NUM_TOKENS = 20
NUM_COMPARED = 40  # so that one tie is less than 0.5 % of the positions
NUM_ROWS = 14
MANY_ROWS = MAX_ROWS_BESIDE + 3  # LoRA runs in line with the products


def close(*rigs: CudaRig) -> None:
    for rig in rigs:
        rig.runner.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        *((name, NUM_ROWS, {}) for name in BASES),
        ("gqa", NUM_ROWS, {"arch": "compute_80"}),
        ("mha", NUM_ROWS, {"dependent_launch": True}),
        ("gqa", MANY_ROWS, {"dependent_launch": True}),
        ("qwen2", MANY_ROWS, {}),
    ],
    ids=[*BASES, "sm_80", "dependent", "gqa in line", "qwen2 in line"],
)
def test_every_choice_is_the_torch_backends(
    model_dirs: dict[str, Path], name: str, rows: int, dtype: str, options: dict[str, Any]
) -> None:
    """Mixed adapters, ranks, scales and chunked prompts; the graph's argmax and the whole vocabulary's probabilities."""
    vocab, num_pages = BASES[name].vocab_size, 512 if rows == NUM_ROWS else 1024
    model_dir = model_dirs[name if dtype == "float32" else f"{name}/plain"]
    torch_runner = make_torch_runner(model_dir, dtype, num_pages=num_pages, max_num_seqs=rows)
    oracle = make_rig(model_dir, torch_runner, dtype, num_pages=num_pages)
    truth = add_sequences(oracle, vocab, rows, draw=Draw(num_logprobs=vocab))
    oracle.harness.generate(truth, NUM_COMPARED)
    runner = make_cuda_runner(
        model_dir, dtype, max_num_seqs=2 * rows, num_pages=num_pages, max_num_batched_tokens=4096, **options
    )
    found = make_rig(model_dir, runner, dtype, num_pages=num_pages)
    agreement = Agreement(dtype)

    greedy = add_sequences(found, vocab, rows)
    reporting = add_sequences(found, vocab, rows, draw=Draw(num_logprobs=vocab))
    for sequence, true in zip([*greedy, *reporting], [*truth, *truth], strict=True):
        sequence.forced = true.drawn
    found.harness.generate(greedy, NUM_COMPARED)
    found.harness.generate(reporting, NUM_COMPARED)

    for row, true in enumerate(truth):
        for position in range(NUM_COMPARED):
            what = f"{name}, row {row}, adapter {row % 6 - 1}, position {position}"
            agreement.choice(what, true.logprobs[position], greedy[row].drawn[position])
            agreement.choice(what, true.logprobs[position], reporting[row].drawn[position])
            agreement.logprobs(true.logprobs[position], reporting[row].logprobs[position])
    agreement.check()
    close(oracle, found)


def drive_overlapped(harness: Harness, sequences: list[Sequence_], num_tokens: int) -> None:
    """Keep two plans in flight, as the step loop does."""
    in_flight: list[StepHandle] = []
    while min(len(sequence.drawn) for sequence in sequences) < num_tokens:
        in_flight.append(harness.runner.launch(harness.plan(sequences)))
        if len(in_flight) == 2:
            harness.absorb(sequences, in_flight.pop(0).wait())
    while in_flight:
        harness.absorb(sequences, in_flight.pop(0).wait())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_plans_in_flight_draw_what_one_at_a_time_draws(model_dirs: dict[str, Path], dtype: str) -> None:
    rig = make_rig(model_dirs["gqa"], make_cuda_runner(model_dirs["gqa"], dtype, max_num_seqs=2 * NUM_ROWS), dtype)
    one, two = (add_sequences(rig, 384, NUM_ROWS) for _ in range(2))

    rig.harness.generate(one, NUM_TOKENS)
    drive_overlapped(rig.harness, two, NUM_TOKENS)

    assert [s.drawn[:NUM_TOKENS] for s in one] == [s.drawn[:NUM_TOKENS] for s in two]
    close(rig)


def test_a_row_draws_alone_what_it_draws_in_a_batch(model_dirs: dict[str, Path]) -> None:
    rig = make_rig(model_dirs["mha"], make_cuda_runner(model_dirs["mha"], "float32", max_num_seqs=40), "float32")
    together, apart = (add_sequences(rig, 384, NUM_ROWS) for _ in range(2))

    rig.harness.generate(together, NUM_TOKENS)
    for sequence in apart:
        rig.harness.generate([sequence], NUM_TOKENS)

    assert [s.drawn for s in together] == [s.drawn for s in apart]
    close(rig)


def ask_for_penalties(sequence: Sequence_) -> None:
    sequence.setup = SlotSetup(
        slot=sequence.slot,
        prompt_token_ids=np.array(sequence.prompt, dtype=np.int32),
        output_token_ids=np.zeros(0, dtype=np.int32),
        uses_penalties=True,
    )


@pytest.mark.parametrize(
    "draw",
    [
        Draw(temperature=0.8, seed=3),
        Draw(temperature=1.2, top_k=20, top_p=0.9, seed=2**63 + 5),
        Draw(temperature=0.7, min_p=0.05, seed=9, num_logprobs=2),
        Draw(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    ],
    ids=["temperature", "truncated", "min_p", "penalties"],
)
def test_sampled_tokens_are_the_torch_backends(model_dirs: dict[str, Path], draw: Draw) -> None:
    drawn = []
    runners = (make_torch_runner(model_dirs["gqa"], "float32"), make_cuda_runner(model_dirs["gqa"], "float32"))
    for runner in runners:
        rig = make_rig(model_dirs["gqa"], runner, "float32")
        sequences = add_sequences(rig, 384, NUM_ROWS)
        for number, sequence in enumerate(sequences):
            if number % 3:
                sequence.draw = draw
                if draw.repetition_penalty != 1:
                    ask_for_penalties(sequence)
        drawn.append(rig.harness.generate(sequences, NUM_TOKENS))
        close(rig)

    assert drawn[0] == drawn[1]


def test_prompt_probabilities_are_the_torch_backends(model_dirs: dict[str, Path]) -> None:
    entries = []
    for runner in (make_torch_runner(model_dirs["gqa"], "float32"), make_cuda_runner(model_dirs["gqa"], "float32")):
        rig = make_rig(model_dirs["gqa"], runner, "float32")
        none = np.zeros(0, dtype=np.int32)
        asks = SlotSetup(slot=0, prompt_token_ids=none, output_token_ids=none, prompt_logprobs=3)
        sequence = rig.harness.add(range(50), adapter=rig.adapters[1], chunks=[20], setup=asks)
        other = rig.harness.add(range(5))
        rig.harness.generate([sequence, other], 3)
        entries.append(sequence.prompt_logprobs)
        close(rig)

    assert len(entries[0]) == len(entries[1]) == 49
    for expected, found in zip(*entries, strict=True):
        assert expected.token_ids.tolist() == found.token_ids.tolist()
        assert np.allclose(expected.logprobs, found.logprobs, atol=1e-3)


@pytest.mark.parametrize(
    "draw",
    [
        Draw(),
        Draw(temperature=0.8, min_p=0.01, seed=4),
        Draw(temperature=1.1, top_k=20, seed=5),
        Draw(temperature=0.9, top_p=0.8, seed=6, num_logprobs=5),
        Draw(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, seed=7),
    ],
    ids=["greedy", "random", "top_k", "top_p and probabilities", "penalties"],
)
def test_steady_decode_never_waits_for_the_device(model_dirs: dict[str, Path], draw: Draw) -> None:
    rig = make_rig(model_dirs["gqa"], make_cuda_runner(model_dirs["gqa"], "bfloat16"), "bfloat16")
    sequences, undisturbed = (add_sequences(rig, 384, NUM_ROWS, draw=draw) for _ in range(2))
    if draw.repetition_penalty != 1:
        for sequence in (*sequences, *undisturbed):
            ask_for_penalties(sequence)
    rig.harness.generate(sequences, 3)
    plans = [rig.harness.plan(sequences) for _ in range(4)]
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [rig.runner.launch(plan) for plan in plans]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for handle in handles:
        rig.harness.absorb(sequences, handle.wait())
    assert rig.harness.generate(undisturbed, len(sequences[0].drawn)) == [s.drawn for s in sequences]
    for sequence, other in zip(sequences, undisturbed, strict=True):
        pairs = zip(sequence.logprobs, other.logprobs, strict=True)
        assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in pairs)
    close(rig)


def delay(runner: CudaRunner) -> None:
    """Keep the compute stream busy for about 0.2 s."""
    with torch.cuda.stream(runner._stream):
        torch.cuda._sleep(400_000_000)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_ordered", [True, False], ids=["with the event", "without it the test sees the damage"])
def test_pages_are_overwritten_only_after_launched_steps_have_read_them(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, is_ordered: bool
) -> None:
    runner = make_cuda_runner(model_dirs["gqa"], "float32")
    harness = Harness(runner, geometry_of(model_dirs["gqa"], "float32"), 512)
    (spec, image), *_ = images(model_dirs["gqa"], runner)
    prompt = list(range(100))
    undisturbed, sequence = harness.add(prompt), harness.add(prompt)
    harness.generate([undisturbed], 4)
    harness.generate([sequence], 3)
    if not is_ordered:
        monkeypatch.setattr(runner._loads._stream, "wait_stream", lambda _stream: None)
    pages = np.array([*sequence.pages, *harness.free[: len(image)]][: len(image)], dtype=np.int32)

    delay(runner)
    step = runner.launch(harness.plan([sequence]))
    load = runner.load_adapter(0, spec, pages, image)
    torch.cuda.synchronize()

    assert load.is_done()
    harness.absorb([sequence], step.wait())
    is_image_whole = torch.equal(runner.pool[torch.from_numpy(pages).cuda()].cpu(), torch.from_numpy(image))
    assert (is_image_whole and sequence.drawn == undisturbed.drawn) is is_ordered
    runner.close()


@pytest.mark.parametrize("is_ordered", [True, False], ids=["with the event", "without it the test sees the damage"])
def test_an_adapters_pages_and_index_change_hands_only_after_launched_steps_have_read_them(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, is_ordered: bool
) -> None:
    """An adapter leaves while a step with it waits on the device; the next one takes its index and its pages."""
    vocab = BASES["gqa"].vocab_size
    runner = make_cuda_runner(model_dirs["gqa"], "float32")
    harness = Harness(runner, geometry_of(model_dirs["gqa"], "float32"), 512)
    leaving, (coming_spec, coming_image) = images(model_dirs["gqa"], runner)[:2]
    pages = np.array([harness.free.pop() for _ in range(max(len(leaving[1]), len(coming_image)))], dtype=np.int32)
    first = runner.load_adapter(0, leaving[0], pages[: len(leaving[1])], leaving[1])
    torch.cuda.synchronize()
    assert first.is_done()
    undisturbed, sequence = (harness.add(range(60), adapter=0, draw=Draw(num_logprobs=vocab)) for _ in range(2))
    harness.generate([undisturbed], 4)
    harness.generate([sequence], 3)
    if not is_ordered:
        monkeypatch.setattr(runner._loads._stream, "wait_stream", lambda _stream: None)

    delay(runner)
    runner.launch(greedy_plan(harness, sequence))
    runner.unload_adapter(0)
    second = runner.load_adapter(0, coming_spec, pages[: len(coming_image)], coming_image)
    torch.cuda.synchronize()
    assert second.is_done()

    logits = runner._decoder.work.logits[0, :vocab].float().cpu()  # behind them are adapters' added tokens
    own = logits.log_softmax(0).numpy()
    truth = np.empty(vocab, dtype=np.float32)
    truth[undisturbed.logprobs[3].token_ids[1:]] = undisturbed.logprobs[3].logprobs[1:]
    assert bool(np.allclose(own, truth, atol=1e-3)) is is_ordered
    runner.close()


def greedy_plan(harness: Harness, sequence: Sequence_) -> StepPlan:
    """The next step without probabilities: launching it waits for nothing."""
    sequence.draw = Draw()
    return harness.plan([sequence])


def geometry_of(model_dir: Path, dtype: str) -> PoolGeometry:
    return choose_pool_geometry(load_base_model(model_dir), dtype=dtype)


def test_an_index_bound_again_serves_the_new_adapter_in_the_same_graph(model_dirs: dict[str, Path]) -> None:
    """Graphs read tables in place: no capture happens after start-up."""
    rig = make_rig(model_dirs["mha"], make_cuda_runner(model_dirs["mha"], "float32"), "float32")
    prompt = list(range(3, 40))
    by_adapter = [rig.harness.generate([rig.harness.add(prompt, adapter=index)], 8)[0] for index in rig.adapters]
    (_, first), (spec, image) = images(model_dirs["mha"], rig.runner)[:2]

    rig.runner.unload_adapter(rig.adapters[1])
    pages = np.array([rig.harness.free.pop() for _ in image], dtype=np.int32)
    handle = rig.runner.load_adapter(rig.adapters[1], spec, pages, image)
    torch.cuda.synchronize()
    assert handle.is_done()

    again = rig.harness.generate([rig.harness.add(prompt, adapter=rig.adapters[1])], 8)[0]
    assert again == by_adapter[2]
    assert len({tuple(tokens) for tokens in by_adapter}) == len(by_adapter), "adapters make no difference"
    assert len(first)
    close(rig)


def test_images_arrive_from_pinned_scattered_and_foreign_memory(model_dirs: dict[str, Path]) -> None:
    runner = make_cuda_runner(model_dirs["mha"], "bfloat16")
    info = load_base_model(model_dirs["mha"])
    spec, tensors = recipe_adapter(info, RECIPES[0], "a" * 64)
    image = pack(runner.geometry, spec, tensors)
    arena = HostArena(3 * len(image), runner.geometry.page_bytes)
    pinned = runner.pin_host_memory(arena.view)
    pinned.wait()
    arena.view[: len(image)] = image
    arena.view[len(image) :: 2][: len(image)] = image
    sources = (arena.view[: len(image)], arena.view[len(image) :: 2][: len(image)], image)

    for index, source in enumerate(sources):
        pages = np.arange(index * len(image), (index + 1) * len(image), dtype=np.int32)[::-1].copy()
        handle = runner.load_adapter(index, spec, pages, source)
        torch.cuda.synchronize()
        assert handle.is_done()
        assert torch.equal(runner.pool[torch.from_numpy(pages).cuda()].cpu(), torch.from_numpy(image)), index
    runner.close()
    arena.close()


def test_an_image_that_lies_in_several_registrations_arrives(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring slots are copied at once, and the device refuses a copy over the border of two registrations."""
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 1)  # the least that can be registered
    runner = make_cuda_runner(model_dirs["mha"], "bfloat16")
    spec, tensors = recipe_adapter(load_base_model(model_dirs["mha"]), RECIPES[0], "a" * 64)
    image = pack(runner.geometry, spec, tensors)
    arena = HostArena(2 * len(image), runner.geometry.page_bytes)
    pinned = runner.pin_host_memory(arena.view)
    pinned.wait()

    for index, first in enumerate((0, len(image) - 1)):
        source = arena.view[first : first + len(image)]
        source[:] = image
        pages = np.arange(index * len(image), (index + 1) * len(image), dtype=np.int32)
        handle = runner.load_adapter(index, spec, pages, source)
        torch.cuda.synchronize()
        assert handle.is_done()
        assert torch.equal(runner.pool[torch.from_numpy(pages).cuda()].cpu(), torch.from_numpy(image)), index
    runner.close()
    arena.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("broken_part", ["keys", "values"])
def test_a_row_whose_logits_are_not_finite_fails_alone(
    model_dirs: dict[str, Path], broken_part: str, dtype: str
) -> None:
    runner = make_cuda_runner(model_dirs["gqa"], dtype)
    harness = Harness(runner, geometry_of(model_dirs["gqa"], dtype), 512)
    healthy, broken = harness.add(range(20)), harness.add(range(40, 60))
    harness.generate([healthy, broken], 2)
    geometry = harness.geometry
    plane = geometry.num_kv_heads * geometry.row_bytes
    first = 0 if broken_part == "keys" else plane
    runner.pool[broken.pages[0], first : first + plane] = 255  # NaN in every key or value of layer 0
    torch.cuda.synchronize()  # the runner's stream does not wait for this one

    result = harness.step([healthy, broken])

    assert list(result.failed_slots) == [broken.slot]
    assert broken.failure is not None
    runner.close()
