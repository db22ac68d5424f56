"""An OpenTelemetry collector of the protocol's own protos: keeps the spans that services send, and checks their form."""

from __future__ import annotations

import threading
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedSpan:
    """A span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[str]
    is_error: bool
    duration_s: float


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans until it is closed.

    Attributes:
        spans: All spans so far.
        target: ``http://HOST:PORT``, once it runs.
    """

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.faults: list[str] = []
        self.target = ""
        self._lock = threading.Lock()

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Take spans."""
        for resource in request.resource_spans:
            facts = {each.key: _value(each.value) for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self._take(str(facts.get("service.name", "")), span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, service: str) -> list[ReceivedSpan]:
        """Return the spans of a service, in the order they came."""
        with self._lock:
            return [span for span in self.spans if span.service == service]

    def _take(self, service: str, span: trace_pb2.Span) -> None:
        is_sound = (
            len(span.trace_id) == 16
            and len(span.span_id) == 8
            and len(span.parent_span_id) in (0, 8)
            and 0 < span.start_time_unix_nano <= span.end_time_unix_nano
            and span.kind != trace_pb2.Span.SPAN_KIND_UNSPECIFIED
            and bool(service and span.name)
            and all(event.name and event.time_unix_nano > 0 for event in span.events)
        )
        received = ReceivedSpan(
            service=service,
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            attributes={each.key: _value(each.value) for each in span.attributes},
            events=[event.name for event in span.events],
            is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
            duration_s=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        )
        with self._lock:
            self.spans.append(received)
            if not is_sound:
                self.faults.append(str(span))


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Run a collector that ends with the block, and check that all that it got was of the protocol's form."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    collector.target = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)
    assert not collector.faults, collector.faults
