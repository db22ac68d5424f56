"""Steps of `TorchRunner` that draw under masks: in two launches, in order, masked rows alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from support.plans import Draw

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("masked") / "base", TinyBase())


@pytest.mark.parametrize("emulate_async", [False, True])
def test_a_mask_changes_its_own_row_alone(model_dir: Path, *, emulate_async: bool) -> None:
    prompts, drawn = [[5, 6, 7], [9, 10], [11, 12, 13, 14]], []
    for allowed in ((), (20, 33, 383)):
        harness = make_rig(model_dir, {}, emulate_async=emulate_async).harness
        draws = [Draw(), Draw(temperature=1.0, seed=3), Draw(temperature=0.7, seed=4)]
        sequences = [harness.add(prompt, draw=draw) for prompt, draw in zip(prompts, draws, strict=True)]
        sequences[1].allowed = allowed
        drawn.append(harness.generate(sequences, 8))

    assert drawn[0][::2] == drawn[1][::2]
    assert set(drawn[1][1]) <= {20, 33, 383}
    assert drawn[0][1] != drawn[1][1]


@pytest.mark.parametrize("emulate_async", [False, True])
def test_a_masked_step_is_neither_read_nor_followed_before_it_is_drawn(model_dir: Path, *, emulate_async: bool) -> None:
    harness = make_rig(model_dir, {}, emulate_async=emulate_async).harness
    masked, plain = harness.add([1, 2, 3], allowed=(4, 5)), harness.add([6, 7])
    plan = harness.plan([masked])
    handle = harness.runner.launch(plan)

    assert not handle.is_done()
    with pytest.raises(RuntimeError, match="awaits masks"):
        handle.wait()
    with pytest.raises(RuntimeError, match="was drawn"):
        harness.runner.launch(harness.plan([plain]))
    assert handle.masks.shape == (1, 12)
    harness.fill(handle.masks, plan, [masked])
    handle.draw()
    assert set(handle.wait().token_ids.tolist()) <= {4, 5}
    with pytest.raises(RuntimeError, match="awaits no masks"):
        handle.draw()


def test_an_empty_mask_ends_its_row_and_says_what_may_be_wrong(model_dir: Path) -> None:
    harness = make_rig(model_dir, {}).harness
    masked, plain = harness.add([1, 2, 3], allowed=(4, 5)), harness.add([6, 7])
    plan = harness.plan([masked, plain])
    handle = harness.runner.launch(plan)
    handle.masks[:] = np.int32(0)
    handle.draw()
    result = handle.wait()

    assert list(result.failed_slots) == [masked.slot]
    assert "rule out every token" in result.failed_slots[masked.slot].message
    assert result.failed_slots[masked.slot].reason == "INVALID_PARAMETER"
