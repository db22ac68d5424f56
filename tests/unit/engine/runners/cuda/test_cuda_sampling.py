"""What the device sampler keeps of a slot's occupant: rows of buffers, edits of single logits, penalty counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loraplex_engine.runners.cuda.sampling import SlotRows, make_bitmap, make_edits, pack_counts
from loraplex_engine.runners.cuda.step_handle import read_report
from loraplex_engine.step import SlotSetup
from loraplex_kernels.sampling.sample import EDIT_NOT_ALLOWED, EDIT_STOP, IN_PROMPT, MOST_COUNTED

NONE = np.zeros(0, np.int32)
CPU = torch.device("cpu")


def make_setup(**fields: Any) -> SlotSetup:
    return SlotSetup(slot=0, prompt_token_ids=NONE, output_token_ids=NONE, **fields)


def test_rows_survive_growth_and_are_used_again() -> None:
    rows = SlotRows(100, CPU, {"a": (3, torch.int32), "b": (1, torch.uint8)})
    assert not rows.buffers, "nothing is allocated before a slot needs it"
    for slot in range(0, 100, 3):
        rows.put(slot, a=np.full(3, slot, np.int32), b=np.array([slot], np.uint8))

    held = rows.of_slot[::3]
    assert sorted(held.tolist()) == list(range(34))
    assert rows.buffers["a"][held.tolist()].tolist() == [[slot] * 3 for slot in range(0, 100, 3)]
    assert rows.buffers["b"][held.tolist(), 0].tolist() == list(range(0, 100, 3))

    freed = int(rows.of_slot[30])
    rows.release(30)
    rows.release(31)
    assert rows.of_slot[30] == -1
    size = len(rows.buffers["a"])
    for slot in range(1, 1 + 3 * (size - 33), 3):
        rows.put(slot, a=np.zeros(1, np.int32))
    assert len(rows.buffers["a"]) == size, "a released row was not used again"
    assert freed in rows.of_slot[1::3]
    assert len(set(rows.of_slot[rows.of_slot >= 0].tolist())) == size


def test_a_slot_keeps_its_row_when_written_again() -> None:
    rows = SlotRows(4, CPU, {"a": (2, torch.int32)})
    rows.put(2, a=np.array([1, 2], np.int32))
    before = rows.of_slot[2]

    rows.put(2, a=np.array([5], np.int32))

    assert rows.of_slot[2] == before
    assert rows.buffers["a"][before].tolist() == [5, 2]


def test_edits_say_of_each_token_all_that_happens_to_it() -> None:
    edits = make_edits(
        make_setup(logit_bias={7: 1.5, 2: -3.0}, allowed_token_ids=(9, 2), stop_token_ids=(9, 4))
    ).tolist()

    assert edits == [
        (2, -3.0, 0),
        (4, 0.0, EDIT_NOT_ALLOWED | EDIT_STOP),
        (7, 1.5, EDIT_NOT_ALLOWED),
        (9, 0.0, EDIT_STOP),
    ]


@pytest.mark.parametrize("setup", [make_setup(), make_setup(uses_penalties=True), make_setup(prompt_logprobs=2)])
def test_without_constraints_there_are_no_edits(setup: SlotSetup) -> None:
    assert len(make_edits(setup)) == 0


def test_bitmap_has_a_bit_per_token() -> None:
    bitmap = make_bitmap(np.array([0, 7, 8, 402], np.int32), 51)

    assert [8 * byte + bit for byte in range(51) for bit in range(8) if bitmap[byte] >> bit & 1] == [0, 7, 8, 402]


def test_counts_mark_the_prompt_and_stop_at_the_largest_they_hold() -> None:
    output = np.concatenate((np.full(40_000, 3), [1, 1])).astype(np.int32)

    counts = pack_counts(6, np.array([1, 2, 2], np.int32), output).view(np.uint16)

    assert counts.tolist() == [0, IN_PROMPT | 2, IN_PROMPT, MOST_COUNTED, 0, 0]


def test_a_report_is_read_as_far_as_each_row_asked() -> None:
    report = np.zeros((3, 1 + 2 * 2), np.int32)
    report[:, :3] = np.array([[-1.0, -0.5, -2.0], [-9.0, -9.0, -9.0], [-3.0, -1.5, -2.5]], np.float32).view(np.int32)
    report[:, 3:] = [[4, 5], [9, 9], [6, 7]]

    found = read_report(report, np.array([11, 12, 13], np.int32), np.array([2, -1, 0], np.int32))

    assert sorted(found) == [0, 2]
    assert found[0].token_ids.tolist() == [11, 4, 5]
    assert found[0].logprobs.tolist() == [-1.0, -0.5, -2.0]
    assert found[2].token_ids.tolist() == [13]
    assert found[2].logprobs.tolist() == [-3.0]
