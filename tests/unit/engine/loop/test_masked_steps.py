"""The step loop and steps that draw under masks: what overlaps with what, and which requests a fault of the masks ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.messages import FinishReason
from support.constraints import Stride, StrideFiller
from support.engine_harness import fake_engine
from support.fake_runner import VOCAB_SIZE, FakeRunner, FakeStep

if TYPE_CHECKING:
    from loraplex_engine.step import StepPlan, StepResult
    from support.engine_harness import EngineHarness, Generation


def structured(harness: EngineHarness, stride: Stride, prompt: list[int]) -> Generation:
    return harness.submit(prompt, max_new_tokens=20, rules=OutputRules(stride.start([])))


def record(runner: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that gets what happens to each step, in order."""
    events: list[tuple[str, int]] = []
    launch, draw, wait = runner.launch, FakeStep.draw, FakeStep.wait

    def launched(plan: StepPlan) -> FakeStep:
        events.append(("launch", plan.step_id))
        return launch(plan)

    def drawn(step: FakeStep) -> None:
        events.append(("draw", step.plan.step_id))
        draw(step)

    def waited(step: FakeStep) -> StepResult:
        result = wait(step)
        events.append(("read", step.plan.step_id))
        return result

    monkeypatch.setattr(runner, "launch", launched)
    monkeypatch.setattr(FakeStep, "draw", drawn)
    monkeypatch.setattr(FakeStep, "wait", waited)
    return events


def test_a_masked_steps_forward_pass_starts_before_the_step_before_is_read_and_its_draw_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_engine(depth=2, filler=StrideFiller(VOCAB_SIZE)) as (harness, runner):
        events = record(runner, monkeypatch)
        harness.wait([structured(harness, Stride(least=99, most=8), [1, 2])])

    middle = [event for event in events if 2 <= event[1] <= 5]
    for step in range(2, 5):
        order = [("launch", step + 1), ("read", step), ("draw", step + 1), ("launch", step + 2)]
        found = [middle.index(event) if event in middle else len(middle) for event in order]
        assert found == sorted(found), middle


def test_plain_steps_are_never_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    filler = StrideFiller(VOCAB_SIZE)
    with fake_engine(depth=2, filler=filler) as (harness, runner):
        events = record(runner, monkeypatch)
        harness.wait([harness.submit([1, 2], max_new_tokens=8)])

    assert not [event for event in events if event[0] == "draw"]
    assert not filler.num_rows


@pytest.mark.parametrize("depth", [1, 2])
def test_masks_that_cannot_be_filled_end_structured_requests_alone(depth: int) -> None:
    def fail() -> None:
        if len(filler.num_rows) == 3:
            raise MemoryError("a bug")

    filler = StrideFiller(VOCAB_SIZE, before=fail)
    with fake_engine(depth=depth, filler=filler) as (harness, _):
        alone = harness.generate([[5, 6, 7]], max_new_tokens=12)
        broken, plain = structured(harness, Stride(), [1, 2]), harness.submit([5, 6, 7], max_new_tokens=12)
        harness.wait([broken, plain])
        filler.before = lambda: None
        (later,) = harness.wait([structured(harness, Stride(least=99, most=4), [1, 2])])

        assert broken.end is not None
        assert broken.end.error is not None
        assert broken.end.error.reason == "INTERNAL"
        assert [plain.tokens] == alone
        assert later.end is not None
        assert later.end.finish_reason is FinishReason.STOP
        assert harness.engine.totals.mask_s > 0
        harness.check_idle()
