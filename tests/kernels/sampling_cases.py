"""Random mixes of requests for the sampling kernel, and a comparison of samplers over several steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_engine.runners.cuda.sampling import DeviceSampler, make_edits, pack_counts
from loraplex_engine.runners.cuda.step_handle import read_report
from loraplex_engine.runners.sampled import Masks
from loraplex_engine.step import SlotSetup, TokenLogprobs
from loraplex_kernels.sampling import reference as reference_sampling
from loraplex_kernels.sampling.sample import VALID
from numpy.typing import NDArray
from support.plans import Draw, sampling_arrays

if TYPE_CHECKING:
    from loraplex_engine.runners.sampler import Sampler
    from loraplex_kernels.sampling.sample import Sample

KINDS = ("peaked", "wide", "flat", "tied", "equal")
NUM_SLOTS = 64


def make_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return ``[rows, vocab]``: like a model's, of a hot model, hardly apart, of 5 values only, or all the same."""
    noise = torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed))
    logits = {
        "peaked": noise * 3 + 4,
        "wide": noise * 12 - 20,
        "flat": noise * 0.01,
        "tied": (noise * 1.5).round(),
        "equal": torch.full_like(noise, -0.75),
    }[kind]
    return logits.to(dtype)


def make_draw(rng: np.random.Generator, vocab: int) -> Draw:
    """Return any mix of parameters; a third are greedy."""
    temperature = float(rng.choice([0.0, 0.0, 0.3, 0.8, 1.0, 2.5, 100.0, 1.2e-38]))
    penalizes = rng.random() < 0.5
    return Draw(
        temperature=temperature,
        top_k=int(rng.choice([0, 0, 1, 5, 50, vocab // 2, vocab, 2 * vocab])),
        top_p=float(rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 1e-6, 1.2e-38])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.3, 1.0, 1.2e-38])),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.7, 10.0, 1.2e-38])) if penalizes else 1.0,
        presence_penalty=float(rng.choice([0.0, 0.6, -0.4, 2.0, -2.0])) if penalizes else 0.0,
        frequency_penalty=float(rng.choice([0.0, 0.37, -0.2, 2.0, -2.0])) if penalizes else 0.0,
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        num_logprobs=int(rng.choice([-1, -1, 0, 1, 20])),
        ban_stops=bool(rng.random() < 0.5),
    )


def make_setup(rng: np.random.Generator, slot: int, vocab: int, draw: Draw) -> SlotSetup:
    """Return what a request may ask beside a draw."""

    def tokens(most: int) -> list[int]:
        found: list[int] = rng.choice(vocab, size=int(rng.integers(1, most)), replace=False).tolist()
        return found

    penalizes = (draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty) != (1.0, 0.0, 0.0)
    none = np.zeros(0, np.int32)
    return SlotSetup(
        slot=slot,
        prompt_token_ids=rng.integers(0, vocab, 30).astype(np.int32) if penalizes else none,
        output_token_ids=rng.integers(0, vocab, 20).astype(np.int32) if penalizes else none,
        logit_bias={token: float(rng.normal() * 4) for token in tokens(40)} if rng.random() < 0.4 else {},
        allowed_token_ids=tuple(tokens(60)) if rng.random() < 0.25 else (),
        stop_token_ids=tuple(tokens(6)) if rng.random() < 0.5 else (),
        uses_penalties=penalizes,
    )


@dataclass
class Batch:
    """Rows in scattered slots; ``allowed``, bool ``[rows, vocab]``, says what a row may draw, if it draws under a mask."""

    slots: NDArray[np.int32]
    draws: list[Draw]
    setups: list[SlotSetup]
    allowed: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    def masks(self, device: torch.device) -> Masks | None:
        return make_masks(self.allowed, device) if self.allowed else None


def make_masks(allowed: dict[int, NDArray[np.bool_]], device: torch.device) -> Masks:
    """Return masks of rows: row -> bool ``[vocab]``."""
    bits = np.stack(list(allowed.values()))
    packed = np.packbits(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32))), axis=1, bitorder="little")
    return Masks(rows=np.array(list(allowed), np.int32), words=torch.from_numpy(packed.view(np.int32)).to(device))


def make_allowed(rng: np.random.Generator, rows: int, vocab: int) -> dict[int, NDArray[np.bool_]]:
    """Return what a third of the rows may draw: most tokens, some, a few or one."""
    allowed = {}
    for row in sorted(rng.choice(rows, size=rows // 3, replace=False).tolist()):
        allowed[row] = rng.random(vocab) < rng.choice([0.99, 0.3, 0.01, 0.0])
        allowed[row][rng.integers(vocab)] = True
    return allowed


def make_batch(rows: int, vocab: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(NUM_SLOTS)[:rows].astype(np.int32)
    draws = [make_draw(rng, vocab) for _ in range(rows)]
    setups = [make_setup(rng, int(slot), vocab, draw) for slot, draw in zip(slots, draws, strict=True)]
    return Batch(slots, draws, setups, make_allowed(rng, rows, vocab))


@dataclass
class Drawn:
    """What one step drew."""

    tokens: list[int]
    outcomes: list[int]
    valid: list[bool]
    last_sampled: list[int]
    logprobs: dict[int, TokenLogprobs]


def device_sampler(library: Any, vocab: int, kernel: Sample | None = None) -> DeviceSampler:
    return DeviceSampler(library, vocab_size=vocab, num_slots=NUM_SLOTS, max_rows=NUM_SLOTS, kernel=kernel)


def draw_on_device(
    sampler: DeviceSampler,
    logits: torch.Tensor,
    slots: NDArray[np.int32],
    draws: list[Draw],
    position: int,
    masks: Masks | None = None,
) -> Drawn:
    device, count = logits.device, len(slots)
    drawn = torch.full((2, count), -7, dtype=torch.int32, device=device)
    last = torch.full((NUM_SLOTS,), -7, dtype=torch.int32, device=device)
    arrays = sampling_arrays(draws, [position] * count)
    report = sampler.sample(logits, slots, arrays, drawn, last, masks)
    tokens = drawn[0].cpu().numpy()
    logprobs = {} if report is None else read_report(report.cpu().numpy(), tokens, arrays.num_logprobs)
    outcomes = drawn[1].tolist()
    return Drawn(tokens.tolist(), outcomes, (drawn[1] == VALID).tolist(), last.cpu()[slots.tolist()].tolist(), logprobs)


def draw_with_torch(
    sampler: Sampler,
    logits: torch.Tensor,
    slots: NDArray[np.int32],
    draws: list[Draw],
    position: int,
    masks: Masks | None = None,
) -> Drawn:
    sampled = sampler.sample(logits, slots, sampling_arrays(draws, [position] * len(slots)), masks)
    outcomes = sampled.outcomes.tolist()
    return Drawn(sampled.token_ids.tolist(), outcomes, sampled.is_valid.tolist(), [], sampled.logprobs_to_host())


def draw_by_reference(sampler: DeviceSampler, batch: Batch, logits: torch.Tensor, position: int) -> list[int]:
    """Draw a batch's first step; -1 for rows without a finite maximum."""
    rows, tokens = sampler.pack_rows(batch.slots, sampling_arrays(batch.draws, [position] * len(batch.slots))), []
    masks = make_masks(batch.allowed, torch.device("cpu"))
    words = dict(zip(masks.rows.tolist(), masks.words.numpy(), strict=True))
    for at, (row, setup, own) in enumerate(zip(rows, batch.setups, logits.cpu(), strict=True)):
        counts = pack_counts(len(own), setup.prompt_token_ids, setup.output_token_ids).view(np.uint16)
        edits = make_edits(setup) if row["edit_row"] >= 0 else None
        kept = counts if setup.uses_penalties else None
        token, is_valid, _ = reference_sampling.sample(own, row, edits, kept, words.get(at))
        tokens.append(token if is_valid else -1)
    return tokens


def check_logprobs(found: dict[int, TokenLogprobs], truth: dict[int, TokenLogprobs], draws: list[Draw]) -> None:
    """Assert the same values in the same order; ids may differ among values that rounding makes equal."""
    assert found.keys() == truth.keys()
    for row, entry in found.items():
        expected = truth[row]
        count = 1 + draws[row].num_logprobs
        assert len(entry.token_ids) == len(entry.logprobs) == min(count, len(expected.logprobs))
        np.testing.assert_allclose(entry.logprobs, expected.logprobs[:count], atol=2e-5, rtol=2e-6)
        differ = np.flatnonzero(entry.token_ids != expected.token_ids[:count])
        values = expected.logprobs
        for i in differ.tolist():
            near = [abs(values[j] - values[i]) < 1e-5 for j in (i - 1, i + 1) if 0 < j < len(values)]
            assert any(near) or i == len(values) - 1 or values[i] == -np.inf, (row, i)


def compare(device: DeviceSampler, oracle: Sampler, batch: Batch, logits: list[torch.Tensor], first: int = 0) -> None:
    """Assert that both draw the same over several steps, which feed the counts of penalties."""
    for setup in batch.setups:
        device.occupy(setup)
        oracle.occupy(setup)
    for step, values in enumerate(logits):
        masks = batch.masks(values.device)
        found = draw_on_device(device, values, batch.slots, batch.draws, first + step, masks)
        truth = draw_with_torch(oracle, values, batch.slots, batch.draws, first + step, masks)
        assert found.outcomes == truth.outcomes
        wrong = [
            (row, batch.draws[row], mine, theirs)
            for row, (mine, theirs, ok) in enumerate(zip(found.tokens, truth.tokens, truth.valid, strict=True))
            if ok and mine != theirs
        ]
        assert not wrong, f"step {step}: {len(wrong)} of {len(truth.tokens)} rows, first {wrong[0]}"
        assert found.last_sampled == found.tokens
        keep = {row for row in truth.logprobs if truth.valid[row]}
        check_logprobs(
            {row: found.logprobs[row] for row in keep}, {row: truth.logprobs[row] for row in keep}, batch.draws
        )


def chi_square_excess(found: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Return by how many standard deviations the chi-square statistic of counts exceeds its mean.

    Tokens expected fewer than 8 times are counted as one.
    """
    expected = probabilities * found.sum()
    assert not found[expected == 0].any(), "an impossible token was drawn"
    common = expected >= 8
    observed = np.append(found[common], found[~common].sum()).astype(float)
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 8:
        wanted[0] += wanted[-1]
        observed[0] += observed[-1]
        wanted, observed = wanted[:-1], observed[:-1]
    freedom = len(wanted) - 1
    return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))


def probabilities_of(logits: torch.Tensor, draw: Draw) -> NDArray[np.float64]:
    """Return fp64 ``[vocab]``, the distribution that a draw without penalties has, by its definition."""
    values = logits.double().cpu().numpy() / draw.temperature
    weights = np.exp(values - values.max())
    weights[weights < draw.min_p] = 0
    order = np.argsort(-weights, kind="stable")
    if draw.top_k:
        weights[order[draw.top_k :]] = 0
    mass = np.cumsum(weights[order]) - weights[order]
    weights[order[mass >= draw.top_p * weights.sum()]] = 0
    result: NDArray[np.float64] = weights / weights.sum()
    return result


EDGES: dict[str, list[Draw]] = {
    "all": [Draw(temperature=1.0), Draw(temperature=2.0)],
    "top_k": [Draw(temperature=2.0, top_k=k) for k in (1, 2, 3, 5, 8)],
    "top_p": [Draw(temperature=2.0, top_p=p) for p in (0.0005, 0.001, 0.0012, 0.002, 0.0045)],
    "both": [Draw(temperature=2.0, top_k=k, top_p=p) for k, p in ((2, 0.5), (3, 0.6), (5, 0.7), (6, 0.75))],
    "min_p": [Draw(temperature=1.5, min_p=p) for p in (0.3, 0.6, 0.95)],
}
"""Draws that keep few of 2,000 tokens of which none stands out, so that one token too many or too few is soon drawn."""


def make_edge_batch(edge: str, rows: int) -> Batch:
    """Return rows without setups that differ in their seeds."""
    draws = [replace(EDGES[edge][row % len(EDGES[edge])], seed=row) for row in range(rows)]
    return Batch(np.arange(rows, dtype=np.int32), draws, [])
