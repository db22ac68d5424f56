"""Load tests against a gateway that plays a script: what is sent when, and how what came back is counted."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_client import AsyncClient
from loraplex_client.load import LoadError, LoadTest
from loraplex_client.workload import ConversationShape, Trace, burst, conversations, prompt_ids
from loraplex_common.errors import SaturatedError, StreamInterruptedError
from support.gateway_double import GatewayDouble, chunk, finished, serving, started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from loraplex.v1 import gateway_pb2

VOCAB_SIZE = 384


def answer(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
    """Play the tokens that were asked for, two at a time."""
    count = request.stopping.max_new_tokens
    yield started()
    for sequence, first in enumerate(range(0, count, 2)):
        yield chunk(sequence, "x", *range(100 + first, 100 + min(first + 2, count)), index=first)
    yield finished(count)


@pytest.fixture
def gateway() -> GatewayDouble:
    double = GatewayDouble()
    double.script = answer
    return double


@pytest.fixture
async def client(gateway: GatewayDouble) -> AsyncIterator[AsyncClient]:
    with serving(gateway) as target:
        async with AsyncClient(target) as client:
            yield client


async def test_every_request_is_sent_as_the_trace_says(client: AsyncClient, gateway: GatewayDouble) -> None:
    trace = Trace.of(np.array([0.0, 0.01, 0.02]), adapter=[1, -1, 0], prompt_tokens=[3, 4, 5], output_tokens=[5, 1, 2])

    result = await LoadTest(client, trace, ["json", "upper"], seed=9, vocab_size=VOCAB_SIZE).run()

    asked = {tuple(request.token_ids.ids): request for request in gateway.requests}
    for index, name in enumerate(["upper", "", "json"]):
        tokens = int(trace.prompt_tokens[index])
        request = asked[tuple(prompt_ids(9, index, tokens, vocab_size=VOCAB_SIZE).tolist())]
        assert request.adapter == name
        assert request.stopping.max_new_tokens == trace.output_tokens[index]
        assert request.stopping.ignore_eos
        assert request.sampling.temperature == 0
    result.measured.require_complete()
    assert result.measured.attainment(60.0) == 1.0
    assert (result.lag_s >= 0).all()
    assert (result.measured.last_s >= result.measured.first_s).all()


async def test_failures_are_counted_by_reason_and_disturb_no_other_request(
    client: AsyncClient, gateway: GatewayDouble
) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        if request.adapter == "full":
            raise SaturatedError("full")
        yield from answer(request)
        if request.adapter == "dies":
            raise StreamInterruptedError("the engine died")

    gateway.script = script

    result = await LoadTest(client, burst(3, 9, output_tokens=4), ["full", "dies", "fine"]).run()

    assert result.errors["SATURATED"] == 3
    assert result.measured.is_finished[2::3].all()
    assert not result.measured.is_finished[0::3].any()
    assert result.measured.num_tokens[0::3].sum() == 0
    assert len(result.measured.failures) == result.errors.total()


async def test_an_answer_that_does_not_come_holds_nobody_back(client: AsyncClient, gateway: GatewayDouble) -> None:
    release = threading.Event()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        if request.adapter == "stuck":
            yield started()
            release.wait(30)
            return
        yield from answer(request)

    gateway.script = script
    trace = Trace.of(np.array([0.0, 0.01, 0.02]), adapter=[0, 1, 1], prompt_tokens=4, output_tokens=3)

    result = await LoadTest(client, trace, ["stuck", "fine"]).run(limit_s=2.0)
    release.set()

    assert result.measured.is_finished.tolist() == [False, True, True]
    assert result.measured.num_unfinished == 1
    assert result.measured.wall_s >= 2.0
    assert not result.errors


async def test_a_turn_waits_for_the_turn_before_and_repeats_what_was_said(
    client: AsyncClient, gateway: GatewayDouble
) -> None:
    trace = conversations(
        ConversationShape(
            num_conversations=3,
            rate=500.0,
            think_s=1e-4,
            token_s=1e-6,
            user_range=(2, 9),
            output_range=(1, 9),
            max_model_len=200,
        )
    )

    result = await LoadTest(client, trace, [], vocab_size=VOCAB_SIZE).run()

    result.measured.require_complete()
    prompts = {len(request.token_ids.ids): list(request.token_ids.ids) for request in gateway.requests}
    assert max(trace.turn) >= 1
    for request in trace:
        if request.turn == 0:
            continue
        before = next(r for r in trace if (r.conversation, r.turn) == (request.conversation, request.turn - 1))
        said = prompts[before.prompt_tokens] + list(range(100, 100 + before.output_tokens))
        candidates = [list(sent.token_ids.ids) for sent in gateway.requests]
        assert any(prompt[: len(said)] == said and len(prompt) == request.prompt_tokens for prompt in candidates)
        assert result.measured.due_s[request.index] >= result.measured.last_s[before.index]


async def test_a_turn_after_one_that_failed_is_not_sent(client: AsyncClient, gateway: GatewayDouble) -> None:
    gateway.failures = [SaturatedError("full")] * 10  # more than gRPC tries
    trace = Trace.of(
        np.array([0.0, 0.0]), prompt_tokens=[4, 9], output_tokens=3, conversation=0, turn=[0, 1], prefix_tokens=[0, 7]
    )

    result = await LoadTest(client, trace, []).run()

    assert result.errors == {"SATURATED": 1, "TURN_BEFORE_FAILED": 1}
    assert np.isnan(result.lag_s[1])


async def test_a_load_that_cannot_be_sent_says_what_is_missing(client: AsyncClient) -> None:
    with pytest.raises(LoadError, match="asks for 4 adapters, the gateway serves 1: import more"):
        LoadTest(client, burst(4, 8), ["json"])
    with pytest.raises(LoadError, match="no requests"):
        LoadTest(client, burst(0, 0), [])


def run_cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from loraplex_client.cli import main

    monkeypatch.setattr("sys.argv", ["loraplex", "load", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_prints_figures_and_fails_below_the_objective(
    gateway: GatewayDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = threading.Lock()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        with lock:
            is_first = len(gateway.requests) == 1
        if is_first:
            raise StreamInterruptedError("the engine died")
        yield from answer(request)

    gateway.script = script
    with serving(gateway) as target:
        monkeypatch.setenv("LORAPLEX_TARGET", target)
        workload = ["--rate", "200", "--requests", "4", "--prompt", "4", "--output", "3", "--slo-ttft", "30"]

        code = run_cli([*workload, "--attainment", "0.5", "--json"], monkeypatch)
        figures = json.loads(capsys.readouterr().out)
        gateway.requests.clear()
        failed = run_cli([*workload, "--attainment", "1"], monkeypatch)
        table = capsys.readouterr()
        gateway.failures = [SaturatedError("full")] * 40
        empty = run_cli(workload, monkeypatch)

    assert code == 0
    assert empty == 1
    assert (figures["requests"], figures["finished"], figures["attainment"]) == (4, 3, 0.75)
    assert figures["errors"] == {"STREAM_INTERRUPTED": 1}
    assert failed == 1
    assert "3 of 4" in table.out
    assert "the engine died" in table.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "flood:3"], "is not burst:N:R"),
        (["--workload", "burst:3:9"], "asks for 3 adapters, the gateway serves 0"),
        (["--popularity", "odd"], "--popularity 'odd'"),
        (["--attainment", "2"], "--attainment must be in 0..1"),
    ],
)
def test_wrong_usage_is_refused_by_name(
    arguments: list[str],
    words: str,
    gateway: GatewayDouble,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with serving(gateway) as target:
        monkeypatch.setenv("LORAPLEX_TARGET", target)

        code = run_cli(arguments, monkeypatch)

    assert code == 2
    assert words in capsys.readouterr().err
    assert not gateway.requests
