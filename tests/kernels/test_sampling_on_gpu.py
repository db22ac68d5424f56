"""The sampling kernel on the GPU against the torch sampler on the same GPU: the same tokens, not only the same distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.sampling_cases import (
    EDGES,
    KINDS,
    NUM_SLOTS,
    chi_square_excess,
    compare,
    device_sampler,
    draw_by_reference,
    draw_on_device,
    make_batch,
    make_edge_batch,
    make_logits,
    probabilities_of,
)
from loraplex_engine.runners.sampler import Sampler
from loraplex_kernels.module import KernelLibrary, device_arch
from support.plans import Draw, sampling_arrays

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16]
VOCABS = [1000, 1003, 32000, 49152, 128256, 151936]
STEPS = 2


def library(dtype: torch.dtype, variant: str = "native") -> KernelLibrary:
    """Return the device's own code, the same with dependent launch, or the sm_80 code assembled by the driver."""
    device = torch.device("cuda", 0)
    if variant == "dependent" and not device_arch(device).startswith("sm_9"):
        pytest.skip("programmatic dependent launch begins with sm_90")
    return KernelLibrary(
        device, dtype, arch="compute_80" if variant == "sm_80" else None, dependent=variant == "dependent"
    )


def steps_of(kind: str, rows: int, vocab: int, dtype: torch.dtype, count: int = STEPS) -> list[torch.Tensor]:
    return [make_logits(kind, rows, vocab, dtype, seed).cuda() for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_every_mix_of_parameters_draws_what_the_torch_sampler_draws(vocab: int, kind: str, dtype: torch.dtype) -> None:
    """Penalty counts are fed by the draws of earlier steps; greedy, random, truncated and constrained rows side by side."""
    device = device_sampler(library(dtype), vocab)
    oracle = Sampler(vocab_size=vocab, device=torch.device("cuda", 0))

    compare(device, oracle, make_batch(NUM_SLOTS, vocab, seed=vocab), steps_of(kind, NUM_SLOTS, vocab, dtype), first=11)


@pytest.mark.parametrize("variant", ["dependent", "sm_80"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_compile_draws_the_same(kind: str, variant: str) -> None:
    vocab, oracle = 49152, Sampler(vocab_size=49152, device=torch.device("cuda", 0))

    compare(
        device_sampler(library(torch.bfloat16, variant), vocab),
        oracle,
        make_batch(NUM_SLOTS, vocab, seed=5),
        steps_of(kind, NUM_SLOTS, vocab, torch.bfloat16),
    )


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_the_reference_draws_what_the_kernel_draws(kind: str) -> None:
    """Its logarithms are the CPU's, so a tie of perturbed values may fall otherwise: once in 64 rows at most."""
    batch, logits = make_batch(NUM_SLOTS, 32000, seed=11), steps_of(kind, NUM_SLOTS, 32000, torch.bfloat16, 1)[0]
    device = device_sampler(library(torch.bfloat16), 32000)
    for setup in batch.setups:
        device.occupy(setup)
    expected = draw_by_reference(device, batch, logits, 5)

    masks = batch.masks(logits.device)
    found = draw_on_device(device, logits, batch.slots, batch.draws, 5, masks)

    tokens = [token if ok else -1 for token, ok in zip(found.tokens, found.valid, strict=True)]
    assert sum(a != b for a, b in zip(tokens, expected, strict=True)) <= 1


def test_a_row_does_not_depend_on_its_batch_nor_on_its_place() -> None:
    vocab, batch = 128256, make_batch(NUM_SLOTS, 128256, seed=2)
    logits = steps_of("peaked", NUM_SLOTS, vocab, torch.bfloat16, 1)[0]
    samplers = [device_sampler(library(torch.bfloat16), vocab) for _ in range(3)]
    for sampler in samplers:
        for setup in batch.setups:
            sampler.occupy(setup)

    together = draw_on_device(samplers[0], logits, batch.slots, batch.draws, 7).tokens

    reverse = draw_on_device(samplers[1], logits.flip(0), batch.slots[::-1].copy(), batch.draws[::-1], 7).tokens
    alone = [
        draw_on_device(samplers[2], logits[row : row + 1], batch.slots[row : row + 1], [batch.draws[row]], 7).tokens[0]
        for row in range(NUM_SLOTS)
    ]
    assert reverse[::-1] == together
    assert alone == together


@pytest.mark.parametrize(
    "draw",
    [
        Draw(temperature=1.0),
        Draw(temperature=0.6),
        Draw(temperature=1.3, top_k=40),
        Draw(temperature=1.0, top_p=0.8),
        Draw(temperature=1.5, min_p=0.05),
        Draw(temperature=1.1, top_k=100, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(draw: Draw) -> None:
    """Chi-square over 25,600 draws with fixed seeds: five standard deviations above its mean is no accident."""
    vocab, launches = 1000, 400
    logits = make_logits("peaked", 1, vocab, torch.float32, 9).cuda()
    sampler, slots = device_sampler(library(torch.float32), vocab), np.arange(NUM_SLOTS, dtype=np.int32)
    draws = [replace(draw, seed=row) for row in range(NUM_SLOTS)]
    rows, found = logits.expand(NUM_SLOTS, -1).contiguous(), np.zeros(vocab, np.int64)

    for position in range(launches):
        found += np.bincount(draw_on_device(sampler, rows, slots, draws, position).tokens, minlength=vocab)

    assert found.sum() == launches * NUM_SLOTS
    assert abs(chi_square_excess(found, probabilities_of(logits[0], draw))) < 5


def test_a_steady_step_makes_no_call_that_waits_for_the_device() -> None:
    vocab, batch = 32000, make_batch(NUM_SLOTS, 32000, seed=3)
    device, logits = device_sampler(library(torch.bfloat16), vocab), steps_of("flat", NUM_SLOTS, vocab, torch.bfloat16)
    for setup in batch.setups:
        device.occupy(setup)
    drawn = torch.zeros((STEPS, 2, NUM_SLOTS), dtype=torch.int32, device="cuda")
    last = torch.zeros(NUM_SLOTS, dtype=torch.int32, device="cuda")
    arrays, masks = (
        [sampling_arrays(batch.draws, [step] * NUM_SLOTS) for step in range(STEPS)],
        batch.masks(last.device),
    )
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(STEPS):
            device.sample(logits[step], batch.slots, arrays[step], drawn[step], last, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    oracle = Sampler(vocab_size=vocab, device=torch.device("cuda", 0))
    for setup in batch.setups:
        oracle.occupy(setup)
    for step in range(STEPS):
        truth = oracle.sample(logits[step], batch.slots, arrays[step], masks)
        assert torch.equal(drawn[step, 0][truth.is_valid], truth.token_ids[truth.is_valid].int())
        assert torch.equal(drawn[step, 1], truth.outcomes)


def test_a_launch_can_be_captured() -> None:
    """Nothing is allocated and nothing read by the host between the arguments and the launch."""
    vocab, count = 32000, 4
    sampler = device_sampler(library(torch.bfloat16), vocab)
    logits = steps_of("peaked", count, vocab, torch.bfloat16, 1)[0]
    slots = np.arange(count, dtype=np.int32)
    draws = [Draw(), Draw(temperature=1.0), Draw(temperature=1.0, top_k=5), Draw(temperature=1.0, top_p=0.9)]
    expected = draw_on_device(sampler, logits, slots, draws, 2).tokens
    rows = torch.from_numpy(sampler.pack_rows(slots, sampling_arrays(draws, [2] * count)).view(np.int32)).cuda()
    drawn, last = (torch.full(shape, -1, dtype=torch.int32, device="cuda") for shape in ((2, count), (NUM_SLOTS,)))
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        sampler.kernel.launch(logits, rows.view(count, -1), drawn, last)
    graph.replay()

    assert drawn[0].tolist() == expected
    assert last[:count].tolist() == expected


@pytest.mark.parametrize("kind", ["flat", "tied", "equal"])
@pytest.mark.parametrize("edge", EDGES)
def test_exactly_the_tokens_are_kept_that_the_torch_sampler_keeps(edge: str, kind: str) -> None:
    oracle = Sampler(vocab_size=2000, device=torch.device("cuda", 0))

    compare(
        device_sampler(library(torch.float32), 2000),
        oracle,
        make_edge_batch(edge, NUM_SLOTS),
        steps_of(kind, NUM_SLOTS, 2000, torch.float32, 10),
    )
