"""Tracing: off unless asked for, one exporter for a process, and parents only from sound trace contexts."""

from __future__ import annotations

import subprocess
import sys
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


def test_a_collector_that_is_away_costs_no_request_anything() -> None:
    tracing.configure("engine", "http://127.0.0.1:1")
    span = tracing.start("x")
    assert span is not None
    span.end({})

    tracing.shut_down()  # within its timeout
