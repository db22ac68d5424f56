"""The blocking client against a gateway that plays a script."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_pb2, gateway_pb2
from loraplex_client import Accepted, AdapterLoading, Chunk, Client, Finished, FinishReason, Queued, Started, Tier
from loraplex_common.errors import (
    AdapterNotFoundError,
    CancelledRequestError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    NoEngineError,
    SaturatedError,
    StreamInterruptedError,
)
from support.gateway_double import DIGEST, GatewayDouble, chunk, finished, serving, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def gateway() -> GatewayDouble:
    return GatewayDouble()


@pytest.fixture
def client(gateway: GatewayDouble) -> Iterator[Client]:
    with serving(gateway) as target, Client(target) as client:
        yield client


def test_a_stream_yields_typed_events(client: Client) -> None:
    events = list(client.generate(prompt="hi", adapter="json"))

    assert [type(event) for event in events] == [Started, Chunk, Chunk, Finished]
    start, first, _, end = events
    assert isinstance(start, Started)
    assert (start.prompt_tokens, start.engine_id, start.adapter_revision, start.seed) == (3, "engine-1", DIGEST, 7)
    assert isinstance(first, Chunk)
    assert (first.text, first.token_ids, first.sequence) == ("Hello", (11,), 0)
    assert isinstance(end, Finished)
    assert (end.finish_reason, end.stop_token_id, end.stop_string) == (FinishReason.STOP, 2, None)
    assert end.usage.output_tokens == 2
    assert end.timings.decode_s == 0.25


def test_every_event_carries_text_and_token_ids(client: Client) -> None:
    events = list(client.generate(prompt="hi"))

    assert "".join(event.text for event in events) == "Hello world"
    assert [token for event in events for token in event.token_ids] == [11, 12]


def test_progress_events_are_typed(client: Client, gateway: GatewayDouble) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield gateway_pb2.GenerateResponse(accepted=gateway_pb2.Accepted(request_id=request.request_id))
        queued = gateway_pb2.Queued(position=4)
        queued.estimated_wait.FromMilliseconds(1500)
        yield gateway_pb2.GenerateResponse(queued=queued)
        yield gateway_pb2.GenerateResponse(
            adapter_loading=gateway_pb2.AdapterLoading(bytes_done=1, bytes_total=2, tier=adapter_pb2.TIER_STORE)
        )
        yield finished()

    gateway.script = script

    accepted, queued, loading, _ = client.generate(prompt="hi", progress_events=True, request_id="r")

    assert accepted == Accepted(request_id="r")
    assert queued == Queued(position=4, estimated_wait_s=1.5)
    assert loading == AdapterLoading(bytes_done=1, bytes_total=2, tier=Tier.STORE)


def test_an_event_of_a_newer_gateway_is_passed_over(client: Client, gateway: GatewayDouble) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield gateway_pb2.GenerateResponse()
        yield finished()

    gateway.script = script

    assert [type(event) for event in client.generate(prompt="hi")] == [Finished]


def test_a_refused_request_raises_the_error_the_gateway_raised(client: Client, gateway: GatewayDouble) -> None:
    gateway.failures = [AdapterNotFoundError("no adapter 'x'", metadata={"adapter": "x"})]

    with pytest.raises(AdapterNotFoundError, match="no adapter 'x'") as raised:
        list(client.generate(prompt="hi", adapter="x"))

    assert raised.value.metadata == {"adapter": "x"}


def test_an_error_in_the_middle_comes_after_what_was_said(client: Client, gateway: GatewayDouble) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield started()
        yield chunk(0, "Hel", 1)
        raise StreamInterruptedError("the engine died")

    gateway.script = script
    stream = client.generate(prompt="hi")

    assert [event.text for event in (next(stream), next(stream))] == ["", "Hel"]
    with pytest.raises(StreamInterruptedError, match="the engine died"):
        next(stream)
    assert list(stream) == []


def test_a_stream_without_an_end_is_an_error(client: Client, gateway: GatewayDouble) -> None:
    gateway.script = lambda request: iter([started()])

    with pytest.raises(StreamInterruptedError, match="without a final event"):
        list(client.generate(prompt="hi"))


def test_unavailable_is_retried_before_the_first_message(client: Client, gateway: GatewayDouble) -> None:
    gateway.failures = [NoEngineError("none yet")]

    assert client.generate_once(prompt="hi").text == "Hello world"
    assert len(gateway.requests) == 2
    assert gateway.requests[0].request_id == gateway.requests[1].request_id


@pytest.mark.parametrize("failures", [[DrainingError("going")] * 3, [CancelledRequestError("gone")]])
def test_a_lone_target_whose_gateway_goes_is_called_once_more_over_another_connection(
    client: Client, gateway: GatewayDouble, failures: list[LoraplexError]
) -> None:
    """gRPC itself repeats UNAVAILABLE twice, and CANCELLED never."""
    gateway.failures = [*failures]

    assert client.generate_once(prompt="hi").text == "Hello world"
    assert len(gateway.requests) == len(failures) + 1


def test_overload_is_not_retried(client: Client, gateway: GatewayDouble) -> None:
    gateway.failures = [SaturatedError("full", retry_after_s=2.5), SaturatedError("full")]

    with pytest.raises(SaturatedError) as raised:
        client.generate_once(prompt="hi")

    assert raised.value.retry_after_s == 2.5
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("leave", ["close", "with", "drop"])
def test_leaving_a_stream_cancels_the_request(client: Client, gateway: GatewayDouble, leave: str) -> None:
    held = threading.Event()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield started()
        held.wait(10)
        yield finished()

    gateway.script = script
    stream = client.generate(prompt="hi")
    assert isinstance(next(stream), Started)

    if leave == "close":
        stream.close()
        assert list(stream) == []
    elif leave == "with":
        with stream:
            pass
    else:
        del stream

    assert gateway.cancelled.wait(5)
    held.set()


def test_a_deadline_ends_the_call(client: Client, gateway: GatewayDouble) -> None:
    held = threading.Event()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        held.wait(10)
        yield finished()

    gateway.script = script

    with pytest.raises(DeadlineError):
        list(client.generate(prompt="hi", timeout=0.2))
    held.set()


def test_a_bad_value_is_refused_before_anything_is_sent(client: Client, gateway: GatewayDouble) -> None:
    with pytest.raises(InvalidParameterError):
        client.generate(prompt="hi", seed=-1)

    assert gateway.requests == []


def test_the_api_key_goes_with_every_call(gateway: GatewayDouble) -> None:
    with serving(gateway) as target, Client(target, api_key="secret") as client:
        client.generate_once(prompt="hi")
        list(client.generate(prompt="hi"))

    assert [metadata["authorization"] for metadata in gateway.metadata] == ["Bearer secret"] * 2


def test_an_unreachable_gateway_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(LoraplexError, match=r"cannot reach 127\.0\.0\.1:1"):
        client.generate_once(prompt="hi", timeout=5)


def test_generate_once_returns_everything(client: Client) -> None:
    completion = client.generate_once(prompt="hi")

    assert completion.text == "Hello world"
    assert completion.token_ids == (11, 12)
    assert completion.started.adapter_revision == DIGEST
    assert completion.finished.finish_reason is FinishReason.STOP


def test_models_are_listed_over_pages(client: Client, gateway: GatewayDouble) -> None:
    gateway.models.append(
        gateway_pb2.ModelCard(
            name="json",
            base_model="base",
            revision=DIGEST,
            aliases=[adapter_pb2.Alias(name="json", label="latest", revision=DIGEST)],
        )
    )

    base, adapter = client.list_models()

    assert (base.name, base.is_adapter) == ("base", False)
    assert (adapter.name, adapter.is_adapter, adapter.aliases) == ("json", True, {"latest": DIGEST})


def test_text_and_token_ids_are_turned_into_each_other(client: Client) -> None:
    assert client.tokenize(prompt="hi") == (104, 105)
    assert client.tokenize(messages=[{"role": "user", "content": "hi"}]) == (104, 105)
    assert client.detokenize([104, 105]) == "hi"


def test_cancel_says_whether_something_ran(client: Client) -> None:
    assert client.cancel("running")
    assert not client.cancel("gone")


def test_a_client_certificate_is_never_left_out_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tls_ca"):
        Client("127.0.0.1:1", tls_cert=tmp_path / "c", tls_key=tmp_path / "k")
