"""Recorded calls made again, byte for byte, and what of their answers must be as it was."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from loraplex.v1 import adapter_store_pb2, engine_pb2, gateway_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message
    from support.earlier.wire import WireCall

TIMEOUT_S: Final = 60.0
GENERATE: Final = "/loraplex.v1.GatewayService/Generate"
ENGINES_OWN: Final = ("AttachEngine", "WatchAliases")  # calls that last as long as an engine runs
VOLATILE: Final = frozenset(
    [
        "create_time",
        "update_time",
        "etag",
        "timings",
        "request_id",
        "engine_id",
        "source",
        "num_engines_resident",
        "started",
        "cached_tokens",
    ]
)
"""Fields whose values no second run repeats."""


def answer_class(method: str) -> type[Message]:
    """Return the class of a method's answers in this checkout's contract."""
    found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    return message_factory.GetMessageClass(found.output_type)


def make_again(channel: grpc.Channel, call: WireCall) -> tuple[int, list[bytes]]:
    """Make a call with the recorded bytes; return its status and the answers' bytes."""
    method: Any = channel.stream_stream(call.method)
    under_way = method(iter(call.messages("request")), timeout=TIMEOUT_S)
    answers: list[bytes] = []
    try:
        answers.extend(under_way)
    except grpc.RpcError as error:
        code: int = error.code().value[0]
        return code, answers
    return 0, answers


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    return value


def _is_within(earlier: Any, now: Any) -> bool:
    """Tell whether all of an earlier answer is in today's, which may have more fields."""
    if isinstance(earlier, dict):
        return isinstance(now, dict) and all(key in now and _is_within(earlier[key], now[key]) for key in earlier)
    if isinstance(earlier, list):
        return isinstance(now, list) and len(now) == len(earlier) and all(map(_is_within, earlier, now))
    return bool(earlier == now)


def _generated(answers: list[bytes]) -> tuple[list[int], str, int]:
    tokens: list[int] = []
    text, reason = "", 0
    for each in map(gateway_pb2.GenerateResponse.FromString, answers):
        tokens += each.chunk.token_ids
        text += each.chunk.text
        reason = each.finished.finish_reason or reason
    return tokens, text, reason


def difference(call: WireCall, answers: list[bytes]) -> str:
    """Say what of the recorded answers is missing in today's; nothing if all is there."""
    recorded = call.messages("response")
    if call.method == GENERATE:
        before, now = _generated(recorded), _generated(answers)
        return "" if before == now else f"{call.method}: {before} became {now}"
    kind = answer_class(call.method)
    read = [
        [_lasting(json_format.MessageToDict(kind.FromString(each), preserving_proto_field_name=True)) for each in some]
        for some in (recorded, answers)
    ]
    return "" if _is_within(*read) else f"{call.method}: {read[0]} became {read[1]}"


def _tokens_by_request(messages: Iterator[tuple[str, bytes]]) -> list[list[int]]:
    """Return the tokens of each request of a session, in the order of the submissions, from what was said in turn."""
    tokens: list[list[int]] = []
    of_slot: dict[int, int] = {}
    for way, message in messages:
        if way == "request":
            for submit in engine_pb2.SessionRequest.FromString(message).submits:
                of_slot[submit.slot] = len(tokens)
                tokens.append([])
            continue
        response = engine_pb2.SessionResponse.FromString(message)
        for slot, token in zip(response.token_slots, response.token_ids, strict=True):
            tokens[of_slot[slot]].append(token)
        for output in response.outputs:
            tokens[of_slot[output.slot]] += output.token_ids
    return tokens


def replay_session(channel: grpc.Channel, call: WireCall) -> tuple[list[list[int]], list[list[int]]]:
    """Say again what a gateway said to its engine, one message after the other's ends; return tokens then and now."""
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    method: Any = channel.stream_stream(call.method)
    answers = method(iter(requests.get, None), timeout=TIMEOUT_S)
    said: list[tuple[str, bytes]] = []
    for message in call.messages("request"):
        said.append(("request", message))
        requests.put(message)
        num_open = len(engine_pb2.SessionRequest.FromString(message).submits)
        while num_open:
            said.append(("response", next(answers)))
            outputs = engine_pb2.SessionResponse.FromString(said[-1][1]).outputs
            num_open -= sum(output.WhichOneof("end") is not None for output in outputs)
    requests.put(None)
    answers.cancel()
    return _tokens_by_request(iter(call.events)), _tokens_by_request(iter(said))


def offers_to(channel: grpc.Channel, call: WireCall) -> tuple[set[str], set[str]]:
    """Say again an engine's hello and its wants; return the digests that it wanted, and those that it is offered."""
    messages = [
        message
        for message in call.messages("request")
        if adapter_store_pb2.AttachEngineRequest.FromString(message).WhichOneof("message") in ("hello", "want")
    ]
    wanted = {
        read.want.digest
        for read in map(adapter_store_pb2.AttachEngineRequest.FromString, messages)
        if read.HasField("want")
    }
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    for message in messages:
        requests.put(message)
    method: Any = channel.stream_stream(call.method)
    answers = method(iter(requests.get, None), timeout=TIMEOUT_S)
    assert adapter_store_pb2.AttachEngineResponse.FromString(next(answers)).HasField("welcome")
    offered: set[str] = set()
    while wanted - offered:
        read = adapter_store_pb2.AttachEngineResponse.FromString(next(answers))
        offered |= {read.offer.digest} if read.HasField("offer") else set()
    requests.put(None)
    answers.cancel()
    return wanted, offered
