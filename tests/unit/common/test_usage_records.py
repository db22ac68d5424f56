"""Usage records are read page by page: each request once, whatever is written meanwhile, and none that is no record."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common import usage_records, valkey
from loraplex_common.usage_records import USAGE_KEY, UsageRecord, UsageSums, read_usage
from loraplex_gateway.usage.ledger import encoded
from loraplex_gateway.usage.script import WRITE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from redis.asyncio import Redis

PAGE = 4


@pytest.fixture
async def client(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    monkeypatch.setattr(usage_records, "_PAGE", PAGE)
    connected = valkey.connect(valkey_url)
    yield connected
    await connected.aclose()


def make_record(usage_id: str, **values: Any) -> UsageRecord:
    given: dict[str, Any] = {"tenant": "acme", "adapter": "poet", "code": "OK", "reason": "STOP", "ended_at": 1.5}
    texts = dict.fromkeys(("request_id", "trace_id", "model", "revision"), "")
    counts = {"input_tokens": 3, "cached_tokens": 1, "output_tokens": 2}
    return UsageRecord(usage_id=usage_id, **{**texts, **counts, **given, **values})


async def write(client: Redis, record: UsageRecord, *, call: str = "call") -> None:
    """Write a record as a gateway does."""
    mark, began_at = f"{USAGE_KEY}:mark:{record.usage_id}", str(record.ended_at - record.duration_s)
    await client.eval(WRITE, 2, USAGE_KEY, mark, "100000", encoded(record), call, began_at, "60")  # type: ignore[misc, unused-ignore]


async def add(client: Redis, fields: dict[str, str]) -> str:
    """Add an entry; return its id."""
    entry: Any = await client.xadd(USAGE_KEY, fields)  # type: ignore[arg-type]
    return str(entry.decode())


async def ids(client: Redis, **options: Any) -> list[str]:
    return [record.usage_id async for record in read_usage(client, **options)]


@pytest.mark.parametrize("number", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])
async def test_every_record_is_read_once_the_newest_first(client: Redis, number: int) -> None:
    for n in range(number):
        await write(client, make_record(f"u{n}"))

    assert await ids(client) == [f"u{n}" for n in reversed(range(number))]


async def test_a_stream_that_is_resumed_while_records_are_read_is_counted_once(client: Redis) -> None:
    """Whether its record was read already or not."""
    for n in range(3 * PAGE):
        await write(client, make_record(f"u{n}"))

    sums = UsageSums(("tenant",))
    reading = read_usage(client)
    first = await anext(reading)
    sums.add(first)
    await write(client, make_record(first.usage_id), call="again")
    await write(client, make_record("u0"), call="again")
    for n in range(2 * PAGE):
        await write(client, make_record(f"new{n}"))
    seen = [first.usage_id]
    async for record in reading:
        sums.add(record)
        seen.append(record.usage_id)

    assert sorted(seen) == sorted([f"u{n}" for n in range(3 * PAGE)] + [f"new{n}" for n in range(2 * PAGE)])
    (used,) = sums.sums.values()
    assert used.requests == 5 * PAGE
    assert used.output_tokens == 2 * 5 * PAGE


async def test_a_record_takes_the_place_of_the_one_that_came_before(client: Redis) -> None:
    for output_tokens in (2, 7):
        text = encoded(make_record("u", output_tokens=output_tokens)).decode()
        await client.xadd(USAGE_KEY, {"record": text})

    assert [record.output_tokens async for record in read_usage(client)] == [7]


async def test_records_outside_of_the_two_moments_are_left_out(client: Redis) -> None:
    for second in (1, 2, 3):
        await client.xadd(USAGE_KEY, {"record": encoded(make_record(f"u{second}"))}, id=f"{second}000-0")

    assert await ids(client, since=2) == ["u3", "u2"]
    assert await ids(client, until=2) == ["u2", "u1"]
    assert await ids(client, since=4) == []


UNREADABLE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda record: record | {"input_tokens": None}, "input_tokens is null, not a number"),
    (lambda record: record | {"output_tokens": "12"}, 'output_tokens is "12", not a number'),
    (lambda record: record | {"output_tokens": True}, "output_tokens is true, not a number"),
    (lambda record: record | {"cached_tokens": -1}, "cached_tokens is -1, not a number from 0"),
    (lambda record: record | {"cached_tokens": 1.5}, "cached_tokens is 1.5, not a whole number"),
    (lambda record: record | {"input_tokens": 2**53 + 1}, r"input_tokens is 9007199254740993, not .* to 2\*\*53"),
    (lambda record: record | {"input_tokens": 10**400}, "input_tokens is 10{39}[.]{3}, not a number"),
    (lambda record: record | {"kv_page_s": float("inf")}, "kv_page_s is inf, not a number"),
    (lambda record: record | {"queue_s": float("nan")}, "queue_s is nan, not a number"),
    (lambda record: record | {"adapter_page_s": [1]}, r"adapter_page_s is \[1\], not a number"),
    (lambda record: record | {"tenant": None}, "tenant is null, not a text"),
    (lambda record: record | {"code": {"a": 1}}, "code is .*, not a text"),
    (lambda record: record | {"usage_id": ""}, "usage_id is empty"),
    (lambda record: {name: value for name, value in record.items() if name != "code"}, "code is missing"),
    (lambda _: {}, "usage_id is missing"),
    (lambda _: None, "it is no object"),
    (lambda record: [record], "it is no object"),
]


@pytest.mark.parametrize(("spoil", "named"), UNREADABLE, ids=[named for _, named in UNREADABLE])
def test_what_is_no_record_is_refused_by_name(spoil: Callable[[dict[str, Any]], Any], named: str) -> None:
    text = json.dumps(spoil(json.loads(encoded(make_record("u")))))

    with pytest.raises(ValueError, match=named):
        UsageRecord.from_json(text)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"input_tokens":' + b"1" * 5000 + b"}"])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        UsageRecord.from_json(text)


def test_fields_of_later_versions_are_left_out_and_those_of_earlier_ones_may_lack() -> None:
    record = json.loads(encoded(make_record("u", calls=3)))
    del record["calls"]

    assert UsageRecord.from_json(json.dumps(record | {"invented": None})) == make_record("u", calls=1)


def test_a_whole_number_that_valkey_wrote_with_an_exponent_is_one() -> None:
    text = encoded(make_record("u")).decode().replace('"output_tokens":2', '"output_tokens":1.5e+14')

    assert UsageRecord.from_json(text).output_tokens == 150_000_000_000_000


async def test_an_entry_that_is_no_record_is_told_of_and_the_others_are_read(client: Redis) -> None:
    await write(client, make_record("u1"))
    spoilt = await add(client, {"record": "null"})
    strange = await add(client, {"another": "field"})
    await write(client, make_record("u2"))
    told: list[str] = []

    assert await ids(client, on_unreadable=lambda entry, error: told.append(f"{entry} {error}")) == ["u2", "u1"]

    assert told == [f"{strange} it is no object", f"{spoilt} it is no object"]
    with pytest.raises(ValueError, match=f"entry {strange} of {USAGE_KEY} is no usage record"):
        await ids(client)


class ManyEntries:
    """A client of Valkey whose stream has many records."""

    def __init__(self, number: int) -> None:
        self._texts = self._all(number)

    @staticmethod
    def _all(number: int) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
        for n in reversed(range(number)):
            yield f"{n}-0".encode(), {b"record": encoded(make_record(f"{n:016x}", request_id="r" * 400))}

    async def xrevrange(self, _: str, *, count: int, **__: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return list(itertools.islice(self._texts, count))

    async def xrange(self, _: str, **__: object) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return []


async def test_summing_many_records_keeps_little_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ids; the test lets it be half of what the records take as text."""
    monkeypatch.setattr(usage_records, "_PAGE", 100)
    number = 20_000
    sums = UsageSums(("tenant",))
    tracemalloc.start()

    async for record in read_usage(ManyEntries(number)):
        sums.add(record)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert sums.sums["acme",].requests == number
    whole = len(encoded(make_record("0" * 16, request_id="r" * 400)))
    assert peak_bytes < number * whole / 2
