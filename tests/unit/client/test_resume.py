"""The client's streams go on when connections and gateways are lost, against gateways that play a script."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import gateway_pb2
from loraplex_client import AsyncClient, Client, Finished, Started
from loraplex_client._resume import PATIENCE_S, StreamProgress
from loraplex_common.errors import (
    AdapterForbiddenError,
    CancelledRequestError,
    DrainingError,
    LoraplexError,
    RemoteError,
    RequestLostError,
    RequestRunningError,
    ResumeInvalidError,
    SaturatedError,
    SlowConsumerError,
    StreamInterruptedError,
)
from support.gateway_double import GatewayDouble, chunk, serving, started
from support.telling_gateway import WORDS, Story, token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def read(client: Client, **options: Any) -> tuple[str, list[type], int]:
    stream = client.generate(prompt="once", **options)
    events = list(stream)
    assert [token_id for event in events for token_id in event.token_ids] == list(range(len(WORDS)))
    return "".join(event.text for event in events), [type(event) for event in events], stream.num_resumes


async def aread(client: AsyncClient, **options: Any) -> tuple[str, list[type], int]:
    stream = client.generate(prompt="once", **options)
    events = [event async for event in stream]
    assert [token_id for event in events for token_id in event.token_ids] == list(range(len(WORDS)))
    return "".join(event.text for event in events), [type(event) for event in events], stream.num_resumes


CUTS = (
    (3, DrainingError("going away")),
    (0, StreamInterruptedError("no engine")),  # a resumed stream that gives nothing before it breaks again
    (2, None),  # the call ends in good order, without an end of the stream
)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_breaks_again_and_again_is_one_stream(is_async: bool) -> None:
    gateway = Story(*CUTS)
    with serving(gateway) as target:
        if is_async:

            async def run() -> tuple[str, list[type], int]:
                async with AsyncClient(target) as client:
                    return await aread(client)

            text, kinds, num_resumes = asyncio.run(run())
        else:
            with Client(target) as client:
                text, kinds, num_resumes = read(client)

    assert text == "".join(WORDS)
    assert (kinds.count(Started), kinds.count(Finished), num_resumes) == (1, 1, 3)
    resumes = [request.resume for request in gateway.requests]
    assert [resume.resume_token for resume in resumes] == ["", token(1), token(2), token(3)]
    assert [list(resume.token_ids) for resume in resumes] == [[], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]
    assert [resume.last_sequence for resume in resumes] == [0, 2, 2, 4]
    assert resumes[3].num_text_bytes == len("".join(WORDS[:5]).encode())
    for request in gateway.requests:
        request.ClearField("resume")
    assert all(request == gateway.requests[0] for request in gateway.requests)


@pytest.mark.parametrize("sequence", [1, 3, 9])
def test_a_chunk_that_is_missing_or_comes_twice_is_asked_for_again(sequence: int) -> None:
    gateway = Story()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        if len(gateway.requests) > 1:
            yield from gateway.tell(request)
            return
        for n, response in enumerate(gateway.tell(request)):
            if n == 3:  # the third chunk has the number 2
                response.chunk.sequence = sequence
            yield response

    gateway.script = script
    with serving(gateway) as target, Client(target) as client:
        text, _, num_resumes = read(client)
        assert (text, num_resumes) == ("".join(WORDS), 1)

        gateway.requests.clear()
        with pytest.raises(StreamInterruptedError, match=f"chunk {sequence} at token 2 came where chunk 2"):
            list(client.generate(prompt="once", resume=False))


@pytest.mark.parametrize(
    ("options", "has_token", "error"),
    [
        ({"resume": False}, True, StreamInterruptedError("no engine")),
        ({}, False, StreamInterruptedError("no engine")),
        ({}, True, SlowConsumerError("read faster")),
        ({}, True, RequestLostError("it may be the cause")),
        ({}, True, RequestRunningError("another call goes on with it")),
    ],
)
def test_what_cannot_or_must_not_go_on_ends(options: dict[str, Any], has_token: bool, error: LoraplexError) -> None:
    gateway = Story((2, error), has_token=has_token)
    with serving(gateway) as target, Client(target) as client:
        stream = client.generate(prompt="once", **options)
        with pytest.raises(type(error), match=error.message):
            list(stream)
        assert list(stream) == []
    assert (len(gateway.requests), stream.num_resumes) == (1, 0)


@pytest.mark.parametrize("refusal", [ResumeInvalidError("it is too old"), AdapterForbiddenError("not yours any more")])
def test_a_resume_that_is_refused_ends_the_stream_with_the_reason(refusal: LoraplexError) -> None:
    gateway = Story((2, DrainingError("going")), (-1, refusal))
    with serving(gateway) as target, Client(target) as client, pytest.raises(type(refusal), match=refusal.message):
        list(client.generate(prompt="once"))
    assert len(gateway.requests) == 2


def test_a_full_gateway_is_asked_again_when_it_says() -> None:
    gateway = Story((2, DrainingError("going")), (-1, SaturatedError("full", retry_after_s=0.2)))
    with serving(gateway) as target, Client(target) as client:
        began = time.monotonic()
        assert read(client)[2] == 1
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("error", [DrainingError("going"), CancelledRequestError("gone")])
def test_a_stream_that_has_not_begun_is_asked_for_again_where_its_lone_gateway_goes(error: LoraplexError) -> None:
    """It may be a proxy, behind which there is another."""
    gateway = Story((-1, error))
    with serving(gateway) as target, Client(target) as client:
        text, kinds, num_resumes = read(client)

    assert text == "".join(WORDS)
    assert (kinds.count(Started), num_resumes, len(gateway.requests)) == (1, 0, 2)


def test_a_stream_is_given_up_at_its_deadline() -> None:
    gateway = Story(*((0, DrainingError("going")) for _ in range(1000)))
    with serving(gateway) as target, Client(target) as client:
        began = time.monotonic()
        with pytest.raises(DrainingError):
            list(client.generate(prompt="once", timeout=1.0))
        assert time.monotonic() - began < 3.0
    assert 2 < len(gateway.requests) < 30  # with pauses that grow


def test_a_stream_without_a_deadline_is_given_up_after_a_while_without_progress() -> None:
    now = [0.0]
    progress = StreamProgress(
        gateway_pb2.GenerateRequest(),
        timeout_s=None,
        resumes=True,
        owns_id=True,
        has_choice=False,
        clock=lambda: now[0],
    )
    start = started()
    start.started.resume_token = "t"
    progress.take(start)
    progress.take(chunk(0, "a", 1))
    error = StreamInterruptedError("no engine")
    while True:
        try:
            now[0] += progress.pause_s(error, is_closed=False)
        except StreamInterruptedError:
            break
        progress.next_request()
        assert progress.take(start) is None  # gateways that begin and give nothing are no progress
    assert PATIENCE_S - 3 < now[0] <= PATIENCE_S
    with pytest.raises(StreamInterruptedError):
        progress.pause_s(error, is_closed=True)


@pytest.mark.parametrize("is_async", [False, True])
def test_closing_a_stream_that_waits_for_its_next_attempt_ends_it_at_once(is_async: bool) -> None:
    gateway = Story((2, DrainingError("going", retry_after_s=20.0)))
    began = time.monotonic()
    with serving(gateway) as target:
        if is_async:

            async def run() -> list[Any]:
                async with AsyncClient(target) as client:
                    stream = client.generate(prompt="once")
                    first = [await anext(stream) for _ in range(3)]
                    rest = asyncio.create_task(_collect(stream))
                    await asyncio.sleep(0.1)  # whether it waits already or not, the outcome is the same
                    await stream.aclose()
                    return first + await rest

            assert len(asyncio.run(run())) == 3
        else:
            with Client(target) as client:
                stream = client.generate(prompt="once")
                first = [next(stream) for _ in range(3)]
                closer = threading.Timer(0.1, stream.close)
                closer.start()
                assert list(stream) == []
                closer.join()
                assert len(first) == 3
    assert time.monotonic() - began < 10


async def _collect(stream: Any) -> list[Any]:
    return [event async for event in stream]


def test_a_client_that_is_closed_resumes_nothing() -> None:
    held = threading.Event()
    gateway = Story()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        for response in gateway.tell(request):
            yield response
            if response.HasField("chunk"):
                held.wait(10)

    gateway.script = script
    with serving(gateway) as target:
        client = Client(target)
        stream = client.generate(prompt="once")
        next(stream), next(stream)
        client.close()
        with pytest.raises(LoraplexError):
            list(stream)
        held.set()
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_client_that_is_closed_while_its_stream_waits_ends_it_with_what_broke_it(is_async: bool) -> None:
    gateway = Story((2, DrainingError("going", retry_after_s=0.5)))
    with serving(gateway) as target:
        if is_async:

            async def run() -> None:
                client = AsyncClient(target)
                stream = client.generate(prompt="once")
                rest = asyncio.create_task(_collect(stream))
                await asyncio.sleep(0.3)
                await client.close()
                await rest

            with pytest.raises(DrainingError):
                asyncio.run(run())
        else:
            client = Client(target)
            stream = client.generate(prompt="once")
            closer = threading.Timer(0.3, client.close)
            closer.start()
            with pytest.raises(DrainingError):
                list(stream)
            closer.join()
            assert list(stream) == []
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("closed", ["stream", "client"])
async def test_who_reads_a_stream_that_another_task_closes_is_not_cancelled(closed: str) -> None:
    held = threading.Event()
    gateway = Story()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield from itertools.islice(gateway.tell(request), 2)
        held.wait(10)

    gateway.script = script
    with serving(gateway) as target:
        client = AsyncClient(target)
        stream = client.generate(prompt="once")
        await anext(stream), await anext(stream)
        rest = asyncio.create_task(_collect(stream))
        await asyncio.sleep(0.1)
        await (stream.aclose() if closed == "stream" else client.close())

        if closed == "stream":
            assert await rest == []
        else:
            with pytest.raises(CancelledRequestError):
                await rest
        await client.close()
        held.set()


@pytest.mark.parametrize("is_async", [False, True])
def test_another_gateway_takes_over_what_one_began_and_what_one_cannot_take(is_async: bool) -> None:
    one, two = Story((3, DrainingError("going"))), Story()
    with serving(one) as first, serving(two) as second:
        if is_async:

            async def run() -> tuple[int, tuple[int, ...]]:
                async with AsyncClient([first, second]) as client:
                    num_resumes = (await aread(client))[2]
                    one.failures = [DrainingError("going")] * 4
                    return num_resumes, await client.tokenize(prompt="hi")

            num_resumes, tokens = asyncio.run(run())
        else:
            with Client(f"{first}, {second}") as client:
                num_resumes = read(client)[2]
                one.failures = [DrainingError("going")] * 4
                tokens = client.tokenize(prompt="hi")
    assert (num_resumes, tokens) == (1, (104, 105))
    assert [len(gateway.requests) for gateway in (one, two)] == [1, 1]


@pytest.mark.parametrize("form", ["ipv4:{},{}", "{},{}"], ids=["one-name-of-two-addresses", "two-targets"])
def test_a_stream_goes_on_at_another_address_when_its_server_stops(form: str) -> None:
    stopped = threading.Event()
    gateways = [Story(), Story()]

    def holding(gateway: Story) -> Callable[[gateway_pb2.GenerateRequest], Iterator[gateway_pb2.GenerateResponse]]:
        def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
            for response in gateway.tell(request):
                yield response
                if response.chunk.sequence == 2 and not stopped.is_set():
                    stopped.wait(20)
                    return

        return script

    for gateway in gateways:
        gateway.script = holding(gateway)
    with contextlib.ExitStack() as client_lives, contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        servers = [first, second]
        targets = [server.enter_context(serving(gateway)) for server, gateway in zip(servers, gateways, strict=True)]
        client = client_lives.enter_context(Client(form.format(*targets)))
        stream = client.generate(prompt="once", timeout=30)
        text = "".join(next(stream).text for _ in range(4))
        used = 0 if gateways[0].requests else 1

        killer = threading.Thread(target=servers[used].close)  # waits for the handler, which waits for us
        killer.start()
        rest = "".join(event.text for event in stream)
        stopped.set()
        killer.join()

        assert text + rest == "".join(WORDS)
        assert stream.num_resumes == 1
        assert len(gateways[1 - used].requests) == 1


def test_a_gateway_that_is_gone_is_passed_over_before_a_stream_begins() -> None:
    gateway = Story()
    with serving(GatewayDouble()) as gone:
        pass
    with serving(gateway) as target, Client([gone, target]) as client:
        for _ in range(3):
            assert read(client)[2] == 0
        assert client.tokenize(prompt="hi") == (104, 105)
    with Client(gone) as client, pytest.raises(RemoteError, match="cannot reach"):
        list(client.generate(prompt="once"))


def test_our_own_first_attempt_is_gone_on_with_where_it_still_runs() -> None:
    running = RequestRunningError("it runs", metadata={"resume_token": "found"})
    gateway = Story((-1, RequestRunningError("a dead gateway has it")), (-1, running))
    with serving(gateway) as target, Client(target) as client:
        assert read(client)[1].count(Started) == 1
        assert [request.resume.resume_token for request in gateway.requests] == ["", "", "found"]

        gateway.breaks = [(-1, running)]
        with pytest.raises(RequestRunningError):  # another caller's, for all we know
            list(client.generate(prompt="once", request_id="given"))
