"""What requests used: the records that gateways write to one stream in Valkey, and sums over them.

One record per request, however many engines ran it and however often its client resumed it. The stream is capped: the
oldest records go first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

USAGE_KEY: Final = "loraplex:usage"
"""Stream of records: field ``record`` of each entry is a `UsageRecord` as JSON."""
RECORD_FIELD: Final = b"record"
_PAGE: Final = 1000


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
        output_tokens: Tokens of the output.
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

    def to_json(self) -> str:
        """Return the record as it lies in the stream."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UsageRecord:
        """Read a record; fields of later versions are left out.

        Raises:
            ValueError: If it is none.
        """
        values: Any = json.loads(text)
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no usage record: {error}") from error


async def read_usage(valkey: Any, *, since: float = 0.0, until: float | None = None) -> AsyncIterator[UsageRecord]:
    """Yield the records that were written between two moments, oldest first.

    Args:
        valkey: A client of redis-py's interface.
        since: Unix seconds.
        until: Unix seconds; None for now.
    """
    first = str(int(since * 1000))
    last = "+" if until is None else str(int(until * 1000))
    while entries := await valkey.xrange(USAGE_KEY, min=first, max=last, count=_PAGE):
        for _, values in entries:
            yield UsageRecord.from_json(values[RECORD_FIELD])
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


def sum_usage(records: Iterable[UsageRecord], by: tuple[str, ...]) -> dict[tuple[str, ...], UsageSum]:
    """Return sums over records with equal values of the fields ``by``: values -> sum."""
    sums: dict[tuple[str, ...], UsageSum] = {}
    for record in records:
        sums.setdefault(tuple(str(getattr(record, name)) for name in by), UsageSum()).add(record)
    return sums
