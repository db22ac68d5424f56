"""Sends ended spans to a collector: OpenTelemetry's batches and exporter, with an encoder of our own.

The SDK makes objects for each span, attribute and event, and copies them once more for the protocol. Here a message that has the
names already is filled with a span's values and copied whole, on the exporter's thread. Only this module imports the SDK.
"""

from __future__ import annotations

from threading import Timer
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, TraceFlags

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from opentelemetry.proto.common.v1 import common_pb2
    from opentelemetry.sdk.trace import ReadableSpan

    from loraplex_common.tracing import Attribute, Span

SCOPE: Final = "loraplex"
# The context of any span that is sent, as far as the SDK's batches ask: that it is sampled.
_KEPT: Final = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
_MAX_INT: Final = 2**63 - 1
_HAS_PARENTAGE: Final = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_IS_REMOTE: Final = trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


class SpanExporter(OTLPSpanExporter):
    """Sends spans of ours, with the SDK's connection, retries and settings from the environment.

    Args:
        endpoint: ``http://HOST:PORT`` or ``https://HOST:PORT`` of the collector.
        timeout_s: How long one batch may take.
        resource: Facts of this process, which go with each batch.
        version: Version of this package.
    """

    def __init__(self, endpoint: str, *, timeout_s: float, resource: dict[str, Attribute], version: str) -> None:
        super().__init__(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=timeout_s)
        self._forms: dict[tuple[tuple[str, ...], tuple[str, ...]], SpanForm] = {}
        self._frame = ExportTraceServiceRequest()
        facts = Resource.create(dict(resource))  # adds what OTEL_RESOURCE_ATTRIBUTES says
        head = self._frame.resource_spans.add(schema_url=facts.schema_url)
        for name, value in facts.attributes.items():
            write_value(head.resource.attributes.add(key=name).value, value)
        scope = head.scope_spans.add()
        scope.scope.name, scope.scope.version = SCOPE, version

    def message(self, spans: Iterable[Span]) -> ExportTraceServiceRequest:
        """Return the protocol's message of a batch."""
        request = ExportTraceServiceRequest()
        request.CopyFrom(self._frame)
        written = request.resource_spans[0].scope_spans[0].spans
        for span in spans:
            written.add().CopyFrom(self._filled(span))
        return request

    def _filled(self, span: Span) -> trace_pb2.Span:
        """Return an ended span's message, which the next call overwrites."""
        present = {name: value for name, value in span.attributes.items() if value is not None}
        shape = (*present,), tuple([event for event, _ in span.events])
        form = self._forms.get(shape)
        if form is None:
            form = self._forms[shape] = SpanForm(*shape)  # as few as there are sets of names in our services
        return form.filled(span, present.values())

    def shutdown(self, timeout_millis: float = 30_000, **options: Any) -> None:
        """End what is being sent and send no more; may be called again, from any thread."""
        if not self._shutdown:  # the SDK's own warns then
            super().shutdown(timeout_millis, **options)

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        """Encode a batch; the SDK calls this for each attempt."""
        return self.message(data)  # type: ignore[arg-type] # the batches hold spans of ours


class Batches:
    """Ended spans on their way to an exporter; OTEL_BSP_* variables set the bounds.

    Args:
        exporter: Where they go.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)

    def add(self, span: Span) -> None:
        """Take an ended span, which does not change any more; never waits."""
        span.context = _KEPT
        self._processor.on_end(span)  # type: ignore[arg-type] # all it asks of a span is its context

    def flush(self) -> None:
        """Send all spans that are here, however long it takes."""
        self._processor.force_flush()

    def close(self, timeout_s: float) -> None:
        """Send all spans that are here, as many as that time is enough for, and end the thread that sends.

        The SDK would wait 5 s for each batch of a collector that does not answer.
        """
        end = Timer(timeout_s, self._exporter.shutdown)
        end.start()
        try:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
        finally:
            end.cancel()


class SpanForm:
    """The message of spans with equal names in it: making objects and texts for names takes longer than all else of a span.

    Args:
        attributes: Names of attributes, in their order.
        events: Names of events.
    """

    def __init__(self, attributes: tuple[str, ...], events: tuple[str, ...]) -> None:
        self._message = message = trace_pb2.Span(kind=trace_pb2.Span.SPAN_KIND_SERVER)
        self._values = [message.attributes.add(key=name).value for name in attributes]
        self._events = [message.events.add(name=name) for name in events]

    def filled(self, span: Span, values: Iterable[Attribute]) -> trace_pb2.Span:
        """Return the message of a span with these attributes; it is filled anew by the next call."""
        message = self._message
        message.trace_id, message.span_id = bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id)
        message.parent_span_id = bytes.fromhex(span.parent_id)
        message.flags = _HAS_PARENTAGE | (_IS_REMOTE if span.parent_id else 0)
        message.name = sound_text(span.name)
        message.start_time_unix_nano, message.end_time_unix_nano = span.began_ns, span.ended_ns
        for place, value in zip(self._values, values, strict=True):
            write_value(place, value)
        for event, (_, at_ns) in zip(self._events, span.events, strict=True):
            event.time_unix_nano = at_ns
        message.ClearField("status")
        if span.error is not None:
            message.status.code = trace_pb2.Status.STATUS_CODE_ERROR
            message.status.message = sound_text(span.error)
        return message


def write_value(message: common_pb2.AnyValue, value: object) -> None:
    """Write an attribute's value; a number that the protocol has no room for is written as text."""
    if isinstance(value, str):
        message.string_value = sound_text(value)
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, int) and -_MAX_INT <= value <= _MAX_INT:
        message.int_value = value
    elif isinstance(value, float):
        message.double_value = value
    elif isinstance(value, list | tuple):
        write_values(message.array_value, value)
    else:
        message.string_value = sound_text(str(value))


def write_values(message: common_pb2.ArrayValue, values: Iterable[object]) -> None:
    """Write the values of a list in the place of what was there; an empty one is a value, too."""
    message.SetInParent()
    del message.values[:]
    for value in values:
        write_value(message.values.add(), value)


def sound_text(text: str) -> str:
    """Return a text that UTF-8 can hold: one lone surrogate of a caller's must not lose a whole batch."""
    return text if text.isascii() else text.encode(errors="replace").decode()
