"""What requests used: the records that gateways write to one stream in Valkey, and sums over them.

One record per request, however many engines ran it and however often its client resumed it. The stream is capped: the
oldest records go first.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

USAGE_KEY: Final = "loraplex:usage"
"""Stream of records: field ``record`` of each entry is a `UsageRecord` as JSON."""
RECORD_FIELD: Final = b"record"
_PAGE: Final = 1000
_MOST: Final = 2**53
"""The greatest number in a record: sums of many are exact, and finite."""
_MOST_SHOWN: Final = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRecord:
    """One request.

    Attributes:
        usage_id: Names the request among all of all times; a resumed stream keeps it, a request id may come again.
        request_id: The request's id.
        trace_id: What the caller's logs call what the request is part of.
        tenant: The tenant that asked.
        model: Name of the base model.
        adapter: The adapter as the request wrote it; several ones with their weights; empty for the base model.
        revision: Digest of its weights; of several, all of them in order.
        input_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt that a cached prefix had where the request first ran.
        output_tokens: Tokens of the output; what was made again because a client had lost it before it resumed counts again.
        generated_tokens: Tokens that engines made for it, as far as is known: a gateway that was killed has not said.
        kv_page_s: Page-seconds of its sequence: see `EngineUsage`.
        adapter_page_s: Page-seconds of its adapters while it ran.
        queue_s: Seconds that it waited for a place, on gateways and engines.
        duration_s: Seconds from its arrival to its end.
        calls: Calls that it took: more than one if its client resumed it.
        attempts: How often an engine was sent it.
        unmetered_attempts: Attempts whose engine was lost before it said what was used: page-seconds lack theirs.
        code: Name of the gRPC status code that it ended with.
        reason: Finish reason, or the error's reason.
        ended_at: When it ended, unix seconds.
    """

    usage_id: str
    request_id: str
    trace_id: str
    tenant: str
    model: str
    adapter: str
    revision: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    generated_tokens: int = 0
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0
    queue_s: float = 0.0
    duration_s: float = 0.0
    calls: int = 1
    attempts: int = 0
    unmetered_attempts: int = 0
    code: str
    reason: str
    ended_at: float

    @classmethod
    def from_json(cls, text: str | bytes) -> UsageRecord:
        """Read a record; fields of later versions are left out.

        Raises:
            ValueError: If it is none; the message names the field.
        """
        try:
            found: Any = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        values: dict[str, Any] = {
            name: _checked(name, found[name], kind) for name, kind in _KINDS.items() if name in found
        }
        lacking = [name for name in _REQUIRED if name not in values]
        if lacking:
            raise ValueError(f"{lacking[0]} is missing")
        if not values["usage_id"]:
            raise ValueError("usage_id is empty")
        return cls(**values)


_KINDS: Final = {field.name: str(field.type) for field in fields(UsageRecord)}
_REQUIRED: Final = tuple(field.name for field in fields(UsageRecord) if field.default is MISSING)


def _checked(name: str, value: Any, kind: str) -> str | int | float:
    """Return a field's value; Valkey's own JSON may write a whole number with an exponent.

    Raises:
        ValueError: If it is none of this kind.
    """
    if kind == "str":
        if isinstance(value, str):
            return value
        raise ValueError(f"{name} is {_shown(value)}, not a text")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise ValueError(f"{name} is {_shown(value)}, not a number from 0 to 2**53")
    if kind == "float":
        return float(value)
    if value != int(value):
        raise ValueError(f"{name} is {_shown(value)}, not a whole number")
    return int(value)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


async def read_usage(
    valkey: Any,
    *,
    since: float = 0.0,
    until: float | None = None,
    on_unreadable: Callable[[str, ValueError], None] | None = None,
) -> AsyncIterator[UsageRecord]:
    """Yield the records that were written between two moments, a page at a time: the newest first, each request once.

    A record takes the place of the one of its request that came before. What is written meanwhile comes last, but for what
    became since of requests that were yielded already.

    Args:
        valkey: A client of redis-py's interface.
        since: Unix seconds.
        until: Unix seconds; None for now.
        on_unreadable: Told of each entry that is no record: its id, and why.

    Raises:
        ValueError: If an entry is no record and `on_unreadable` is None.
    """
    seen: set[str] = set()  # a record moves to the newest end when its stream is resumed, also while it is read
    async for entry, values in _entries(valkey, since, until):
        try:
            record = UsageRecord.from_json(values.get(RECORD_FIELD, b"null"))
        except ValueError as error:
            if on_unreadable is None:
                raise ValueError(f"entry {entry} of {USAGE_KEY} is no usage record: {error}") from error
            on_unreadable(entry, error)
            continue
        if record.usage_id not in seen:
            seen.add(record.usage_id)
            yield record


async def _entries(valkey: Any, since: float, until: float | None) -> AsyncIterator[tuple[str, dict[bytes, bytes]]]:
    """Yield entries from the newest to the oldest, then those that were written meanwhile, as they came.

    An entry that moves while the pages before its own are read is met at its new place, and none is passed by.
    """
    first, last = str(int(since * 1000)), "+" if until is None else str(int(until * 1000))
    newest = ""
    while entries := await valkey.xrevrange(USAGE_KEY, max=last, min=first, count=_PAGE):
        newest = newest or entries[0][0].decode()
        for entry, values in entries:
            yield entry.decode(), values
        last = "(" + entries[-1][0].decode()
    if until is not None:
        return
    first = "(" + newest if newest else first
    while entries := await valkey.xrange(USAGE_KEY, min=first, max="+", count=_PAGE):
        for entry, values in entries:
            yield entry.decode(), values
        if len(entries) < _PAGE:  # all that was there: under load there would always be more
            return
        first = "(" + entries[-1][0].decode()


@dataclass(kw_only=True, slots=True)
class UsageSum:
    """What some requests used together; the fields are sums of those of `UsageRecord`."""

    requests: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    kv_page_s: float = 0.0
    adapter_page_s: float = 0.0
    queue_s: float = 0.0

    def add(self, record: UsageRecord) -> None:
        """Count a request."""
        self.requests += 1
        self.failed += record.code != "OK"
        self.input_tokens += record.input_tokens
        self.cached_tokens += record.cached_tokens
        self.output_tokens += record.output_tokens
        self.kv_page_s += record.kv_page_s
        self.adapter_page_s += record.adapter_page_s
        self.queue_s += record.queue_s


class UsageSums:
    """Sums over records with equal values of some fields.

    Args:
        by: The fields' names.

    Attributes:
        sums: Values of the fields -> sum.
    """

    def __init__(self, by: tuple[str, ...]) -> None:
        self._by = by
        self.sums: dict[tuple[str, ...], UsageSum] = {}

    def add(self, record: UsageRecord) -> None:
        """Count a request."""
        values = tuple(str(getattr(record, name)) for name in self._by)
        self.sums.setdefault(values, UsageSum()).add(record)
