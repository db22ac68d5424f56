"""Traces of requests, sent to an OpenTelemetry collector (OTLP over gRPC); off unless a service is given an endpoint.

One span for a request in each service, with events, and none for a message. As with logs, it is the process that traces:
`configure` at its start, `start` wherever a span begins, which is None while tracing is off. The SDK is imported only when it is
on (extra ``tracing``).
"""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.version import package_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

Attribute = str | bool | int | float | list[str]

TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
EXPORT_TIMEOUT_S: Final = 5.0
FLUSH_TIMEOUT_S: Final = 2.0

_NO_TRACE: Final = "0" * 32
_provider: TracerProvider | None = None
_tracer: Tracer | None = None


class TracingError(ValueError):
    """Tracing cannot be turned on; the message says what to do."""


def ids_of(traceparent: str) -> tuple[str, str]:
    """Return trace id and span id of a W3C trace context; two empty texts if it is none."""
    match = TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or match[2] == _NO_TRACE or (match[1] == "00" and match[5]):
        return "", ""
    return match[2], match[3]


def configure(service: str, endpoint: str | None, sample_ratio: float = 1.0) -> None:
    """Turn tracing on or, without an endpoint, off; to be called once no further process is forked.

    Args:
        service: Name of the service; the traces' ``service.name`` is ``loraplex-`` and this.
        endpoint: ``http://HOST:PORT`` or ``https://HOST:PORT`` of a collector's OTLP gRPC port.
        sample_ratio: Part of the traces to keep that begin here; what a caller has decided is kept to.

    Raises:
        TracingError: If the SDK is not installed.
    """
    global _provider, _tracer
    shut_down()
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise TracingError(
            f"--otlp-endpoint needs {error.name}: install 'loraplex[tracing]', or leave the flag out"
        ) from error
    resource = Resource.create(
        {
            "service.name": f"loraplex-{service.replace('_', '-')}",
            "service.version": package_version(),
            "service.instance.id": uuid.uuid4().hex,
        }
    )
    _provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(sample_ratio)))
    _provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S)
        )
    )
    _tracer = _provider.get_tracer("loraplex", package_version())


def flush() -> None:
    """Send what has gathered; waits a while at most."""
    if _provider is not None:
        _provider.force_flush(int(FLUSH_TIMEOUT_S * 1000))


def shut_down() -> None:
    """Send what has gathered, and turn tracing off."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.force_flush(int(FLUSH_TIMEOUT_S * 1000))
        provider.shutdown()


class Span:
    """One request in one service.

    Attributes:
        traceparent: W3C trace context that makes spans elsewhere its children.
    """

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        self._began_at, self._began_ns = time.monotonic(), time.time_ns()

    @property
    def is_recording(self) -> bool:
        """Whether the span is kept; what is set on it costs nothing else."""
        return bool(self._span.is_recording())

    def event(self, name: str, at: float) -> None:
        """Note something that happened at a moment of `time.monotonic`."""
        self._span.add_event(name, timestamp=self._began_ns + int((at - self._began_at) * 1e9))

    def end(self, attributes: Mapping[str, Attribute | None], *, error: str | None = None) -> None:
        """End the span.

        Args:
            attributes: What has become of it; None is left out.
            error: Reason of the failure; None if it is none.
        """
        if self.is_recording:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
            if error is not None:
                from opentelemetry.trace import StatusCode

                self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def start(name: str, *, parent: str = "", is_server: bool = True) -> Span | None:
    """Begin a span; None while tracing is off.

    Args:
        name: Its name.
        parent: W3C trace context of the span that it belongs to; anything else begins a trace.
        is_server: Whether it answers a call.
    """
    if _tracer is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context

    context: Context | None = None
    trace_id, span_id = ids_of(parent)
    if trace_id:
        flags = trace.TraceFlags(int(TRACEPARENT.fullmatch(parent)[4], 16) & trace.TraceFlags.SAMPLED)  # type: ignore[index]
        above = trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=flags)
        if above.is_valid:
            context = trace.set_span_in_context(trace.NonRecordingSpan(above))
    kind = trace.SpanKind.SERVER if is_server else trace.SpanKind.INTERNAL
    return Span(_tracer.start_span(name, context=context if context is not None else Context(), kind=kind))
