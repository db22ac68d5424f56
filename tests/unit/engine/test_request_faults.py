"""An exception while one request is prepared or read ends that request with an error id, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_common.errors import LoraplexError
from loraplex_engine.messages import Submission
from loraplex_engine.runners import sampled, sampler
from loraplex_engine.runners.prompt_logprobs import PromptLogprobTracker
from loraplex_engine.runners.sampler import Sampler
from loraplex_engine.runners.top_tokens import likeliest
from loraplex_engine.sampling_params import SamplingParams
from loraplex_engine.scheduler import intake
from loraplex_engine.scheduler.adapter_fetching import AdapterFetching
from loraplex_engine.scheduler.decode_state import DecodeState
from loraplex_engine.scheduler.feasibility import Feasibility
from loraplex_engine.scheduler.placement import Placement
from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
from loraplex_engine.scheduler.request import Request
from loraplex_engine.scheduler.result_reader import ResultReader
from loraplex_engine.scheduler.running_batch import Chunk, RunningBatch
from support.base_models import write_base_model
from support.engine_harness import torch_engine
from support.plans import Draw, sampling_arrays
from support.scheduler_rig import Rig, make_submission, solo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POISON = "poison"
POISON_TOP = 7
PLACES = [
    (intake, "make_request"),
    (Feasibility, "refuse_if_unservable"),
    (AdapterFetching, "fetch"),
    (Feasibility, "end_if_unreachable"),
    (PrefixSharing, "find"),
    (Placement, "_stop_ids_of"),
    (DecodeState, "_set_sampling"),
    (RunningBatch, "_tokens_of"),
    (PrefixSharing, "publish"),
    (ResultReader, "_send_prompt_logprobs"),
]


def is_poison(value: object) -> bool:
    value = value.request if isinstance(value, Chunk) else value
    value = value.submission if isinstance(value, Request) else value
    return isinstance(value, Submission) and value.request_id == POISON


def failing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Do what is asked, then raise if it was for the poisoned request."""

    def call(*arguments: Any, **fields: Any) -> Any:
        result = original(*arguments, **fields)
        if any(map(is_poison, arguments)):
            raise ValueError("a bug")
        return result

    return call


def check_internal(error: LoraplexError | None) -> None:
    assert type(error) is LoraplexError
    assert error.metadata["error_id"] in error.message
    assert "a bug" not in error.message, "internals stay in the log"


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_wherever_something_is_done_for_one_request_its_exception_is_its_own(
    monkeypatch: pytest.MonkeyPatch, depth: int, owner: Any, name: str
) -> None:
    rig = Rig(depth=depth, num_pages=40)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    asks = SamplingParams(num_logprobs=0, prompt_logprobs=0)
    submissions = [
        make_submission(slot=slot, adapter=adapter, prompt=[slot] * 9, max_new_tokens=6, sampling=asks)
        for slot, adapter in enumerate([None, "a", "a", "b"])
    ]
    submissions[1] = replace(submissions[1], request_id=POISON)

    clients = [rig.submit(submission) for submission in submissions]
    rig.turn()
    for digest in list(rig.wanted):
        rig.deliver(digest)
    rig.run()

    check_internal(clients[1].error)
    for client in (clients[0], *clients[2:]):
        assert client.tokens == solo(client.submission, 6)
        assert client.prompt_logprobs == list(range(1, 9))
    rig.check_finished()


def test_probabilities_that_are_missing_fail_who_asked_for_them(depth: int) -> None:
    rig = Rig(depth=depth)
    asked = rig.submit(make_submission(slot=0, max_new_tokens=1, sampling=SamplingParams(num_logprobs=0)))
    other = rig.submit(make_submission(slot=1, max_new_tokens=6))
    original = rig.runner._sample
    rig.runner._sample = lambda *arguments: replace(original(*arguments), logprobs={})  # type: ignore[method-assign]

    rig.run()

    check_internal(asked.error)
    assert other.tokens == solo(other.submission, 6)
    rig.check_finished()


# --- the runner ---


def fail_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make probabilities of `POISON_TOP` alternatives, and edits of a bias of 77, raise."""
    constrain, occupy = sampler._constrain, Sampler.occupy

    def broken_likeliest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if count == POISON_TOP:
            raise RuntimeError("a bug")
        return likeliest(values, count)

    def broken_constrain(logits: torch.Tensor, state: sampler.SlotState, *, ban_stops: bool) -> None:
        if 77.0 in state.setup.logit_bias.values():
            raise IndexError("a bug")
        constrain(logits, state, ban_stops=ban_stops)

    def broken_occupy(self: Sampler, setup: Any) -> None:
        occupy(self, setup)
        if 78.0 in setup.logit_bias.values():
            raise IndexError("a bug")

    monkeypatch.setattr(sampled, "likeliest", broken_likeliest)
    monkeypatch.setattr(sampler, "_constrain", broken_constrain)
    monkeypatch.setattr(Sampler, "occupy", broken_occupy)


BROKEN = [
    SamplingParams(temperature=0.0, num_logprobs=POISON_TOP),
    SamplingParams(temperature=0.0, prompt_logprobs=POISON_TOP),
    SamplingParams(temperature=0.0, logit_bias={1: 77.0}),
    SamplingParams(temperature=0.0, logit_bias={1: 78.0}),
]
SOUND = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, num_logprobs=0, prompt_logprobs=0),
    SamplingParams(temperature=0.0, num_logprobs=3),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, logit_bias={5: 1.0}),
    SamplingParams(temperature=0.9, seed=3, top_k=5),
]


@pytest.mark.parametrize("emulate_async", [False, True], ids=["depth1", "depth2"])
def test_what_the_runner_cannot_do_for_one_row_fails_that_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulate_async: bool
) -> None:
    prompt = list(range(20, 60))
    with torch_engine(
        write_base_model(tmp_path / "base"), max_num_batched_tokens=32, emulate_async=emulate_async
    ) as harness:
        alone = [harness.generate([prompt], sampling=sampling)[0] for sampling in SOUND]
        fail_at(monkeypatch)

        together = [harness.submit(prompt, sampling=sampling) for sampling in [*SOUND, *BROKEN]]
        harness.wait(together)

        assert [generation.tokens for generation in together[: len(SOUND)]] == alone
        assert [len(generation.logprobs) for generation in together[: len(SOUND)]] == [0, 16, 16, 0, 0]
        for generation in together[len(SOUND) :]:
            assert generation.end is not None
            check_internal(generation.end.error)
        assert not harness.crashes
        harness.check_idle()


def test_only_the_rows_that_raise_alone_lose_what_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch)
    logits = torch.randn((4, 128), generator=torch.Generator().manual_seed(1))
    draws = [Draw(num_logprobs=n) for n in (2, POISON_TOP, -1, 0)]

    drawn = Sampler(vocab_size=128, device=torch.device("cpu")).sample(
        logits, np.array([4, 5, 6, 7], np.int32), sampling_arrays(draws, [0] * 4)
    )

    assert list(drawn.faults) == [5]
    found = drawn.logprobs_to_host()
    assert {row: len(entry.token_ids) for row, entry in found.items()} == {0: 3, 3: 1}
    assert drawn.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("owner", [Sampler, PromptLogprobTracker])
def test_a_broken_device_is_nobodys_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type[Sampler | PromptLogprobTracker]
) -> None:
    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with torch_engine(write_base_model(tmp_path / "base")) as harness:
        monkeypatch.setattr(owner, "_draw" if owner is Sampler else "_entries", lost)
        (end,) = harness.wait(
            [harness.submit([1, 2], sampling=SamplingParams(temperature=1.0, seed=1, prompt_logprobs=0))]
        )

        assert end.end is not None
        assert "the engine failed" in str(end.end.error)
        assert len(harness.crashes) == 1
