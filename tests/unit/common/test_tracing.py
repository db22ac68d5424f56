"""Tracing: off unless asked for, one exporter for a process, and parents only from sound trace contexts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_common import tracing
from support.otlp_collector import Collector, running_collector

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACE, SPAN = "a" * 32, "b" * 16


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector
        tracing.shut_down()


def test_while_it_is_off_no_span_begins_and_no_sdk_is_imported() -> None:
    code = (
        "import sys, loraplex_common.tracing as t; t.configure('gateway', None); "
        "assert t.start('x', parent='y') is None; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_without_the_sdk_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "loraplex_common.trace_export", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)

    with pytest.raises(tracing.TracingError, match=r"loraplex\[tracing\]"):
        tracing.configure("gateway", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("text", "is_sound"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"01-{TRACE}-{SPAN}-01-more", True),  # of a later version
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        ("", False),
        ("x" * 10_000, False),
    ],
)
def test_a_trace_context_is_taken_as_w3c_has_it(text: str, is_sound: bool) -> None:
    assert tracing.ids_of(text) == ((TRACE, SPAN) if is_sound else ("", ""))


def test_a_span_is_a_child_of_its_parent_and_parent_of_its_own(collector: Collector) -> None:
    tracing.configure("engine", collector.target)
    outer = tracing.start("outer", parent=f"00-{TRACE}-{SPAN}-01")
    assert outer is not None
    inner = tracing.start("inner", parent=outer.traceparent)
    assert inner is not None

    inner.end({"a": 1, "b": None}, error="DEADLINE")
    outer.end({})
    tracing.flush()

    first, second = collector.spans
    assert (first.name, second.name, first.service) == ("inner", "outer", "loraplex-engine")
    assert (first.trace_id, second.trace_id, second.parent_id) == (TRACE, TRACE, SPAN)
    assert first.parent_id == second.span_id
    assert first.attributes == {"a": 1}
    assert (first.is_error, second.is_error) == (True, False)


@pytest.mark.parametrize("parent", ["", "garbage", f"00-{TRACE}-{'0' * 16}-01"])
def test_without_a_sound_parent_a_trace_begins(collector: Collector, parent: str) -> None:
    tracing.configure("engine", collector.target)
    span = tracing.start("x", parent=parent)
    assert span is not None

    span.end({})
    tracing.flush()

    assert collector.spans[0].parent_id == ""
    assert collector.spans[0].trace_id not in (TRACE, "0" * 32)


def test_what_the_caller_has_decided_about_sampling_is_kept_to(collector: Collector) -> None:
    tracing.configure("engine", collector.target, sample_ratio=0.0)
    for parent in ("", f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-01"):
        span = tracing.start(parent or "root", parent=parent)
        assert span is not None
        assert span.traceparent.endswith("-01") == parent.endswith("-01")
        span.end({"a": 1})
    tracing.flush()

    assert [span.name for span in collector.spans] == [f"00-{TRACE}-{SPAN}-01"]


def test_every_kind_of_attribute_arrives_as_it_was(collector: Collector) -> None:
    attributes: dict[str, tracing.Attribute | None] = {
        "text": "grüße",
        "empty": "",
        "yes": True,
        "zero": 0,
        "below": -(2**40),
        "part": 0.25,
        "list": ["stop", "length"],
        "empty_list": [],
        "none": None,
    }
    tracing.configure("engine", collector.target)
    span = tracing.start("x")
    assert span is not None
    span.end(attributes)
    tracing.flush()

    assert collector.spans[0].attributes == {name: value for name, value in attributes.items() if value is not None}


def test_what_the_protocol_cannot_hold_loses_no_other_span(collector: Collector) -> None:
    tracing.configure("engine", collector.target)
    for name, value in (("first", 1), ("lone \ud800", "\udfff!"), ("huge", 10**30), ("last", 2)):
        span = tracing.start(name)
        assert span is not None
        span.end({"a": value}, error=name)
    tracing.flush()

    found = {span.name: span.attributes["a"] for span in collector.spans}
    assert found == {"first": 1, "lone ?": "?!", "huge": "1" + "0" * 30, "last": 2}


def test_a_span_that_ends_twice_is_sent_once(collector: Collector) -> None:
    tracing.configure("engine", collector.target)
    span = tracing.start("x")
    assert span is not None
    span.end({"a": 1})
    span.end({"a": 2})
    tracing.flush()

    assert [span.attributes for span in collector.spans] == [{"a": 1}]


def test_a_span_that_outlives_tracing_ends_in_silence(collector: Collector) -> None:
    tracing.configure("engine", collector.target)
    span = tracing.start("x")
    assert span is not None
    tracing.shut_down()
    span.end({})

    assert collector.spans == []


def test_the_part_of_traces_that_is_asked_for_is_kept(collector: Collector) -> None:
    tracing.configure("engine", collector.target, sample_ratio=0.25)
    spans = [tracing.start("x") for _ in range(4000)]

    num_kept = sum(span is not None and span.is_recording for span in spans)
    assert 800 < num_kept < 1200  # seven standard deviations to each side


def test_two_spans_have_nothing_in_common_unless_one_is_the_others_child(collector: Collector) -> None:
    tracing.configure("engine", collector.target)
    spans = [tracing.start("x") for _ in range(1000)]
    traces = {tracing.ids_of(span.traceparent)[0] for span in spans if span is not None}

    assert len(traces) == 1000


def test_the_environment_adds_to_the_facts_of_a_process_as_with_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=other,deployment.environment.name=test")
    from loraplex_common.trace_export import SpanExporter

    exporter = SpanExporter("http://127.0.0.1:1", timeout_s=1, resource={"service.name": "ours"}, version="1")
    (head,) = exporter.message([]).resource_spans
    facts = {each.key: each.value.string_value for each in head.resource.attributes}
    exporter.shutdown()

    assert facts["service.name"] == "ours"
    assert facts["deployment.environment.name"] == "test"
    assert facts["telemetry.sdk.name"] == "opentelemetry"


@pytest.fixture
def silent_collector() -> Iterator[str]:
    """Endpoint of one that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("is_away", [False, True])
def test_a_collector_that_does_not_answer_holds_up_no_end_of_a_service(silent_collector: str, *, is_away: bool) -> None:
    tracing.configure("engine", "http://127.0.0.1:1" if is_away else silent_collector)
    for _ in range(2000):
        span = tracing.start("x")
        assert span is not None
        span.end({})

    began_at = time.monotonic()
    tracing.shut_down()

    assert time.monotonic() - began_at < 2 * tracing.CLOSE_TIMEOUT_S  # once 5 s for each of four batches
