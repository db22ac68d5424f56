"""Traces of requests, sent to an OpenTelemetry collector (OTLP over gRPC); off unless a service is given an endpoint.

One span for a request in each service, with events, and none for a message. As with logs, it is the process that traces:
`configure` at its start, `start` wherever a span begins, which is None while tracing is off. The SDK is imported only when it is
on (extra ``tracing``), and only to send: a span is this module's own, as the SDK's costs a request many times more.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from typing import TYPE_CHECKING, Final

from loraplex_common.version import package_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.trace_export import Batches

Attribute = str | bool | int | float | list[str]

TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0

_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_ONE: Final = 1 << 64  # a trace is kept if the lower half of its id is below its share of this, as other SDKs have it
_batches: Batches | None = None
_bound = _ONE


class TracingError(ValueError):
    """Tracing cannot be turned on; the message says what to do."""


def ids_of(traceparent: str) -> tuple[str, str]:
    """Return trace id and span id of a W3C trace context; two empty texts if it is none."""
    match = _sound(traceparent)
    return ("", "") if match is None else (match[2], match[3])


def _sound(traceparent: str) -> re.Match[str] | None:
    match = TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or match[2] == _NO_TRACE or (match[1] == "00" and match[5]):
        return None
    return match


def configure(service: str, endpoint: str | None, sample_ratio: float = 1.0) -> None:
    """Turn tracing on or, without an endpoint, off; to be called once no further process is forked.

    Args:
        service: Name of the service; the traces' ``service.name`` is ``loraplex-`` and this.
        endpoint: ``http://HOST:PORT`` or ``https://HOST:PORT`` of a collector's OTLP gRPC port.
        sample_ratio: Part of the traces to keep that begin here; what a caller has decided is kept to.

    Raises:
        TracingError: If the SDK is not installed.
    """
    global _batches, _bound
    shut_down()
    if endpoint is None:
        return
    try:
        from loraplex_common.trace_export import Batches, SpanExporter
    except ImportError as error:
        raise TracingError(
            f"--otlp-endpoint needs {error.name}: install 'loraplex[tracing]', or leave the flag out"
        ) from error
    resource: dict[str, Attribute] = {
        "service.name": f"loraplex-{service.replace('_', '-')}",
        "service.version": package_version(),
        "service.instance.id": uuid.uuid4().hex,
    }
    _bound = round(sample_ratio * _ONE)
    _batches = Batches(SpanExporter(endpoint, timeout_s=EXPORT_TIMEOUT_S, resource=resource, version=package_version()))


def flush() -> None:
    """Send what has gathered, however long it takes."""
    if _batches is not None:
        _batches.flush()


def shut_down() -> None:
    """Send what has gathered, within `CLOSE_TIMEOUT_S`, and turn tracing off."""
    global _batches
    gathered, _batches = _batches, None
    if gathered is not None:
        gathered.close(CLOSE_TIMEOUT_S)


class Span:
    """One request in one service.

    Args:
        name: Its name.
        trace_id: 32 hexadecimal digits.
        parent_id: Span that it belongs to, 16 digits; empty for the first of a trace.
        is_recording: Whether it is kept; what is set on it costs nothing else.

    Attributes:
        traceparent: W3C trace context that makes spans elsewhere its children.
        attributes: What has become of it, once it has ended; None stands for none.
        events: What happened, and when, in ns since 1970.
        error: Reason of the failure; None if it is none.
        began_ns, ended_ns: Begin and end, in ns since 1970.
    """

    __slots__ = (
        "_began_at",
        "attributes",
        "began_ns",
        "context",
        "ended_ns",
        "error",
        "events",
        "is_recording",
        "name",
        "parent_id",
        "span_id",
        "trace_id",
        "traceparent",
    )

    def __init__(self, name: str, trace_id: str, parent_id: str, *, is_recording: bool) -> None:
        self.name, self.trace_id, self.parent_id, self.is_recording = name, trace_id, parent_id, is_recording
        self.span_id = f"{random.getrandbits(64) or 1:016x}"
        self.traceparent = f"00-{trace_id}-{self.span_id}-{is_recording:02x}"
        self.attributes: Mapping[str, Attribute | None] = {}
        self.events: list[tuple[str, int]] = []
        self.error: str | None = None
        self.context: object = None  # what batches of the SDK ask about
        self._began_at, self.began_ns, self.ended_ns = time.monotonic(), time.time_ns(), 0

    def event(self, name: str, at: float) -> None:
        """Note something that happened at a moment of `time.monotonic`."""
        self.events.append((name, self.began_ns + int((at - self._began_at) * 1e9)))

    def end(self, attributes: Mapping[str, Attribute | None], *, error: str | None = None) -> None:
        """End the span.

        Args:
            attributes: What has become of it; None is left out. Must not change any more.
            error: Reason of the failure; None if it is none.
        """
        if not self.is_recording or self.ended_ns or _batches is None:
            return
        self.attributes, self.error = attributes, error
        self.ended_ns = max(self.began_ns, time.time_ns())  # clocks are set back at times
        _batches.add(self)


def start(name: str, *, parent: str = "") -> Span | None:
    """Begin a span; None while tracing is off.

    Args:
        name: Its name.
        parent: W3C trace context of the span that it belongs to; anything else begins a trace.
    """
    if _batches is None:
        return None
    match = _sound(parent) if parent else None
    if match is not None and match[3] != _NO_SPAN:
        return Span(name, match[2], match[3], is_recording=bool(int(match[4], 16) & 1))
    trace_id = random.getrandbits(128) or 1
    return Span(name, f"{trace_id:032x}", "", is_recording=trace_id % _ONE < _bound)
