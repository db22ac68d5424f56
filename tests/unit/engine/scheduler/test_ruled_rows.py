"""Outputs with rules: what they draw, where they end, and that nothing of it reaches other requests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_engine.constraints.banned_sequences import BannedSequences
from loraplex_engine.constraints.output_rules import OutputRules
from loraplex_engine.messages import FinishReason
from loraplex_engine.sampling_params import SamplingParams
from support.constraints import Stride
from support.fake_runner import draw
from support.scheduler_rig import EOS, Client, Rig, make_submission, solo

if TYPE_CHECKING:
    from loraplex_engine.messages import Submission

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def ruled(
    stride: Stride | None = None,
    *,
    bans: list[tuple[int, ...]] | None = None,
    resumed: list[int] | None = None,
    **fields: object,
) -> Submission:
    """Return a request with rules; ``fields`` as in `make_submission`."""
    resumed = resumed or []
    rules = OutputRules(
        None if stride is None else stride.start(resumed),
        BannedSequences(bans, resumed) if bans else None,
        eos_token_ids=(EOS,),
    )
    return make_submission(resumed=resumed, rules=rules, **fields)  # type: ignore[arg-type]


def expected(submission: Submission, stride: Stride) -> list[int]:
    """Return the new tokens of a structured request without eos that runs alone, to its structure's end."""
    prompt: list[int] = submission.prompt_token_ids.tolist()
    output: list[int] = submission.resumed_token_ids.tolist()
    num_resumed = len(output)
    while len(output) < stride.most:
        tokens = np.array(prompt + output, dtype=np.int32)
        allows = partial(stride.allows, len(output))
        token = draw(tokens, (), submission.sampling.seed, (), allows)
        output.append(token)
    return output[num_resumed:]


def seeded(index: int) -> SamplingParams:
    return SamplingParams(seed=index)


@DEPTHS
def test_structured_rows_draw_under_their_masks_and_end_where_the_structure_does(depth: int) -> None:
    rig, stride = Rig(depth=depth, num_pages=64, max_num_seqs=8), Stride(least=99, most=9)
    requests = [ruled(stride, slot=n, sampling=seeded(n), max_new_tokens=30) for n in range(3)]
    strangers = [make_submission(slot=10 + n, sampling=seeded(n), max_new_tokens=14) for n in range(3)]
    clients = [rig.submit(each) for pair in zip(requests, strangers, strict=True) for each in pair]

    rig.run()

    assert [client.tokens for client in clients[::2]] == [expected(each, stride) for each in requests]
    assert [(c.finish_reason, c.end.stop_token_id) for c in clients[::2] if c.end] == [(FinishReason.STOP, None)] * 3
    assert [client.tokens for client in clients[1::2]] == [solo(each, 14) for each in strangers]
    rig.check_finished()


@DEPTHS
def test_a_structured_row_gets_a_token_of_every_step(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=64)
    rig.submit(ruled(Stride(least=99, most=12), max_new_tokens=12))

    rig.run()

    assert rig.scheduler.counters.num_steps <= 12 + depth - 1


@DEPTHS
def test_steps_without_structured_rows_have_no_masks(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=64)
    structured = rig.submit(ruled(Stride(least=99, most=3), slot=1))
    rig.submit(make_submission(slot=2, max_new_tokens=20))
    plans = []
    launch = rig.runner.launch
    rig.runner.launch = lambda plan: plans.append(plan) or launch(plan)  # type: ignore[func-returns-value,method-assign]

    rig.run()

    assert structured.finish_reason is FinishReason.STOP
    masked = [len(plan.masked) for plan in plans]
    assert masked[:3] == [1, 1, 1]
    assert masked[4:] == [0] * len(masked[4:])
    assert len(masked) > 15


def first_with_eos(stride: Stride, *, ignore_eos: bool) -> Client:
    """Return the first of many requests that drew end-of-text."""
    rig, make = Rig(depth=2, num_pages=64, max_num_seqs=8), partial(ruled, stride, ignore_eos=ignore_eos)
    clients = [rig.submit(make(slot=n, sampling=seeded(n), max_new_tokens=50)) for n in range(40)]
    rig.run()
    assert all(client.finish_reason is FinishReason.STOP for client in clients)
    return next(client for client in clients if EOS in client.tokens)


def test_end_of_text_ends_the_output_where_the_structure_allows_it() -> None:
    client = first_with_eos(Stride(least=2, most=40), ignore_eos=False)

    assert client.tokens.index(EOS) == len(client.tokens) - 1 >= 2
    assert client.end is not None
    assert client.end.stop_token_id == EOS


def test_end_of_text_ends_a_structured_output_with_ignore_eos_too() -> None:
    client = first_with_eos(Stride(least=2, most=40), ignore_eos=True)

    assert client.tokens.index(EOS) == len(client.tokens) - 1
    assert client.end is not None
    assert client.end.stop_token_id == EOS


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_no_end_of_text_is_drawn_before_min_new_tokens(*, ignore_eos: bool) -> None:
    rig, stride = Rig(depth=2, num_pages=64, max_num_seqs=8), Stride(least=2, most=40)
    make = partial(ruled, stride, ignore_eos=ignore_eos, min_new_tokens=9, max_new_tokens=50)
    clients = [rig.submit(make(slot=n, sampling=seeded(n))) for n in range(30)]

    rig.run()

    lengths = [len(client.tokens) for client in clients]
    assert min(lengths) > 9
    assert max(lengths) < 40, "some draw end-of-text as soon as they may"


@DEPTHS
def test_a_complete_structure_ends_the_output_before_min_new_tokens(depth: int) -> None:
    rig = Rig(depth=depth)
    client = rig.submit(ruled(Stride(least=0, most=4), ignore_eos=False, min_new_tokens=8, max_new_tokens=20))

    rig.run()

    assert (client.finish_reason, len(client.tokens)) == (FinishReason.STOP, 4)
    assert EOS not in client.tokens


@DEPTHS
def test_an_output_of_which_no_token_is_left_ends_alone(depth: int) -> None:
    rig = Rig(depth=depth)
    nothing = rig.submit(ruled(Stride(), bans=[(token,) for token in range(50) if token % 5 == 2], slot=1))
    stranger = rig.submit(make_submission(slot=2, max_new_tokens=9))

    rig.run()

    assert nothing.error is not None
    assert len(nothing.tokens) == 2
    assert stranger.tokens == solo(stranger.submission, 9)


@DEPTHS
def test_a_structure_that_fails_ends_its_own_request_alone_and_its_token_is_not_sent(depth: int) -> None:
    rig, stride = Rig(depth=depth, num_pages=64), Stride(least=99, most=10)
    broken = rig.submit(ruled(replace(stride, breaks_at=4), slot=1))
    good = rig.submit(ruled(stride, slot=2, max_new_tokens=20))
    plain = rig.submit(make_submission(slot=3, max_new_tokens=9))

    rig.run()

    assert broken.error is not None
    assert "it is too hard" in broken.error.message
    assert isinstance(broken.error, InvalidParameterError), "sent again, it would end alike: not a fault of the engine"
    assert broken.error.field == "structured_output"
    assert broken.tokens == expected(broken.submission, stride)[:4]
    assert good.tokens == expected(good.submission, stride)
    assert plain.tokens == solo(plain.submission, 9)
    rig.check_finished()


@DEPTHS
def test_preempted_outputs_go_on_under_their_rules(depth: int) -> None:
    rig, stride = Rig(depth=depth, num_pages=10, block_tokens=2, max_num_seqs=6), Stride(least=99, most=11)
    requests = [ruled(stride, slot=n, sampling=seeded(n), max_new_tokens=11, bans=[(40, 41)]) for n in range(6)]
    clients = [rig.submit(each) for each in requests]

    rig.run()

    assert rig.scheduler.counters.num_preemptions > 0
    assert [client.tokens for client in clients] == [expected(each, stride) for each in requests]
    rig.check_finished()


@DEPTHS
def test_an_output_is_resumed_where_its_structure_stood(depth: int) -> None:
    stride = Stride(least=99, most=9)
    whole = expected(make_submission(), stride)
    rig = Rig(depth=depth)
    client = rig.submit(ruled(stride, resumed=whole[:4], max_new_tokens=20))
    complete = rig.submit(ruled(stride, resumed=whole, max_new_tokens=20, slot=1))

    rig.run()

    assert client.tokens == whole[4:]
    assert (complete.tokens, complete.finish_reason) == ([], FinishReason.STOP)


@DEPTHS
def test_banned_sequences_never_appear(depth: int) -> None:
    rig = Rig(depth=depth, num_pages=64, max_model_len=64)
    free = make_submission(max_new_tokens=40)
    drawn = solo(free, 40)
    bans = [tuple(drawn[n : n + 2]) for n in range(0, 30, 3)] + [(drawn[1],)]
    client = rig.submit(ruled(bans=bans, max_new_tokens=40))

    rig.run()

    pairs = set(zip(client.tokens, client.tokens[1:], strict=False))
    assert len(client.tokens) == 40
    assert not pairs & set(bans)
    assert drawn[1] not in client.tokens
    assert client.finish_reason is FinishReason.LENGTH


@DEPTHS
def test_an_aborted_structured_request_leaves_the_others_be(depth: int) -> None:
    rig, stride = Rig(depth=depth, num_pages=64), Stride(least=99, most=10)
    gone, stays = (rig.submit(ruled(stride, slot=n, max_new_tokens=20)) for n in (1, 2))
    for _ in range(3):
        rig.turn()

    rig.scheduler.abort(1, 1)
    rig.run()

    assert gone.finish_reason is FinishReason.CANCELLED
    assert stays.tokens == expected(stays.submission, stride)
    rig.check_finished()
