"""The CUDA backend's inputs: what the host writes is what the device's views show, in buckets and in mixed steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loraplex_engine.runners.cuda.step_input import InputLayout, InputWriter, StepInputs, StepShape, is_pure_decode
from loraplex_engine.step import FROM_DEVICE, NO_ADAPTER, StepPlan
from support.plans import Draw, sampling_arrays

BLOCK = 4
PAD_SLOT = 99


def make_plan(starts: list[int], lengths: list[int], *, num_decode: int, sampled: list[int]) -> StepPlan:
    rng = np.random.default_rng(len(starts))
    blocks = [-(-(start + length) // BLOCK) for start, length in zip(starts, lengths, strict=True)]
    tables = np.full((len(starts), max(blocks)), -1, dtype=np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = rng.permutation(50)[:count]
    return StepPlan(
        step_id=1,
        slots=rng.permutation(20)[: len(starts)].astype(np.int32),
        num_tokens=np.array(lengths, dtype=np.int32),
        starts=np.array(starts, dtype=np.int32),
        token_ids=np.array(
            [FROM_DEVICE] * num_decode + list(range(100, 100 + sum(lengths[num_decode:]))), dtype=np.int32
        ),
        block_tables=tables,
        adapters=np.full(len(starts), NO_ADAPTER, dtype=np.int32),
        adapter_scales=rng.random(len(starts)).astype(np.float32),
        num_decode_rows=num_decode,
        sample_rows=np.array(sampled, dtype=np.int32),
        sampling=sampling_arrays([Draw()] * len(sampled), [0] * len(sampled)),
    )


def sent(buffer: np.ndarray, count: int) -> torch.Tensor:
    """A device buffer that holds garbage wherever nothing was sent."""
    device = torch.full((len(buffer),), 777, dtype=torch.int32)
    device[:count] = torch.from_numpy(buffer[:count])
    return device


def check_tokens(step: StepInputs, plan: StepPlan) -> None:
    """Compare with the plan, token by token."""
    token = 0
    for row in range(len(plan.slots)):
        for within in range(int(plan.num_tokens[row])):
            position = int(plan.starts[row]) + within
            page = int(plan.block_tables[row, position // BLOCK])
            assert step.token_ids[token] == plan.token_ids[token]
            assert step.slots[token] == plan.slots[row]
            assert step.positions[token] == position
            assert step.kv_slots[token] == page * BLOCK + position % BLOCK
            assert step.sequences[token] == row
            assert step.contexts[token] == position + 1
            assert step.scales[token] == plan.adapter_scales[row]
            token += 1


def test_a_bucket_holds_the_rows_and_harmless_padding() -> None:
    plan = make_plan([0, 7, 8, 21], [1, 1, 1, 1], num_decode=4, sampled=[0, 1, 2, 3])
    layout = InputLayout(StepShape(num_tokens=8, num_rows=8, width=9, num_samples=8))
    buffer = np.full(layout.size, 555, dtype=np.int32)

    count = InputWriter(block_tokens=BLOCK, pad_slot=PAD_SLOT).write_decode(layout, buffer, plan)

    step = layout.views(sent(buffer, count))
    check_tokens(step, plan)
    assert torch.equal(step.block_tables[:4, : plan.block_tables.shape[1]], torch.from_numpy(plan.block_tables))
    assert step.sample_tokens.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert step.sample_slots.tolist() == [*plan.slots.tolist(), *[PAD_SLOT] * 4]
    for name, value in (("kv_slots", -1), ("sequences", -1), ("contexts", 0), ("token_ids", 0), ("slots", PAD_SLOT)):
        assert getattr(step, name)[4:].tolist() == [value] * 4, name


def test_a_smaller_step_in_the_same_buffer_leaves_nothing_of_the_larger_one() -> None:
    layout = InputLayout(StepShape(num_tokens=4, num_rows=4, width=9, num_samples=4))
    writer, buffer = InputWriter(block_tokens=BLOCK, pad_slot=PAD_SLOT), np.zeros(layout.size, dtype=np.int32)
    writer.write_decode(layout, buffer, make_plan([3, 7, 9, 21], [1] * 4, num_decode=4, sampled=[0, 1, 2, 3]))
    small = make_plan([30], [1], num_decode=1, sampled=[0])

    count = writer.write_decode(layout, buffer, small)

    step = layout.views(sent(buffer, count))
    check_tokens(step, small)
    assert step.contexts[1:].tolist() == [0, 0, 0]
    assert step.kv_slots[1:].tolist() == [-1, -1, -1]


def test_a_mixed_step_holds_decode_rows_then_chunks() -> None:
    plan = make_plan([9, 0, 6], [1, 5, 7], num_decode=1, sampled=[0, 2])
    tiles = np.arange(24, dtype=np.int32).reshape(3, 8)
    layout = InputLayout(
        StepShape(num_tokens=13, num_rows=3, width=plan.block_tables.shape[1], num_samples=2, num_tiles=3)
    )
    buffer = np.full(layout.size, 555, dtype=np.int32)

    count = InputWriter(block_tokens=BLOCK, pad_slot=PAD_SLOT).write_mixed(layout, buffer, plan, tiles)

    step = layout.views(sent(buffer, count))
    check_tokens(step, plan)
    assert torch.equal(step.block_tables, torch.from_numpy(plan.block_tables))
    assert torch.equal(step.tiles, torch.from_numpy(tiles))
    assert step.sample_tokens.tolist() == [0, 12]
    assert step.sample_slots.tolist() == plan.slots[[0, 2]].tolist()


@pytest.mark.parametrize(
    ("num_decode", "sampled", "expected"), [(2, [0, 1], True), (1, [0, 1], False), (2, [1], False)]
)
def test_only_steps_of_sampling_decode_rows_are_pure(num_decode: int, sampled: list[int], expected: bool) -> None:
    assert is_pure_decode(make_plan([4, 4], [1, 1], num_decode=num_decode, sampled=sampled)) is expected
