"""The simulator as a process: JSON in, JSON out."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_engine.simulation import __main__ as entry
from loraplex_engine.simulation.question import QuestionError, answer, read_question

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "trace.npz"
    np.savez(
        path,
        arrival_s=np.cumsum(rng.exponential(0.1, 50)),
        adapter=rng.integers(-1, 6, 50).astype(np.int32),
        tenant=np.zeros(50, np.int32),
        prompt_tokens=rng.integers(8, 100, 50).astype(np.int32),
        output_tokens=rng.integers(8, 100, 50).astype(np.int32),
        conversation=np.full(50, -1, np.int32),
    )
    return path


def make_question(trace_path: Path, **changes: object) -> dict[str, Any]:
    return {
        "model": "llama3-8b",
        "gpu": "h100",
        "trace": str(trace_path),
        "num_adapters": 6,
        "ranks": [8, 16],
        **changes,
    }


def test_an_answer_counts_every_request(trace_path: Path) -> None:
    answered = answer(read_question(make_question(trace_path, num_engines=2, slo_ttft_s=1.0, slo_tpot_s=0.05)))

    summary = answered["summary"]
    assert summary["num_requests"] == summary["num_done"] == 50
    assert summary["attainment"] == 1.0
    assert summary["resident_share"] + summary["arena_share"] + summary["miss_share"] == pytest.approx(1.0)
    assert len(answered["engines"]) == 2
    assert all(0 < engine["busy_share"] <= 1 for engine in answered["engines"])
    json.dumps(answered)


def test_pages_of_fp8_hold_as_many_tokens_in_half_the_bytes_and_take_less_time(trace_path: Path) -> None:
    plain, fp8 = (answer(read_question(make_question(trace_path, kv_cache_dtype=each))) for each in ("auto", "fp8"))

    assert plain["sizes"]["page_bytes"] == 2 * 2**20
    assert fp8["sizes"]["page_bytes"] == 2**20 + 16 * 32 * 2 * 8 * 2
    assert fp8["sizes"]["pool_kv_tokens"] / plain["sizes"]["pool_kv_tokens"] == pytest.approx(
        2 / (1 + 2 / 128), rel=1e-3
    )
    assert fp8["engines"][0]["busy_share"] < plain["engines"][0]["busy_share"]
    with pytest.raises(QuestionError, match="kv_cache_dtype 'int4' is not one of auto, fp8"):
        read_question(make_question(trace_path, kv_cache_dtype="int4"))


def test_a_pace_nobody_can_keep_is_attained_by_nobody(trace_path: Path) -> None:
    answered = answer(read_question(make_question(trace_path, slo_tpot_s=1e-6)))

    assert answered["summary"]["attainment"] == 0.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gpu": "abacus"}, "abacus"),
        ({"tensor_parallel": 0}, "tensor_parallel 0 is not in 1..64"),
        ({"targets": "some"}, "some"),
        ({"routing": "lottery"}, "lottery"),
        ({"num_engines": 0}, "num_engines"),
        ({"ranks": []}, "ranks"),
        ({"slo_ttft_s": 0}, "objectives"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_name(
    trace_path: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(QuestionError, match=named):
        read_question(make_question(trace_path, **changes))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"trace": "/nowhere.npz"}, "TraceError"),
        ({"num_adapters": 2}, "TraceError"),
        ({"model": "gpt"}, "ShapeError"),
        ({"model": "llama3-70b"}, "ShapeError"),
        ({"arena_bytes": 1 << 21}, "ShapeError"),
        ({"gpu": "abacus"}, "QuestionError"),
    ],
)
def test_what_cannot_be_answered_ends_with_its_kind(
    trace_path: Path,
    changes: dict[str, object],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(make_question(trace_path, **changes))))

    code = entry.main()

    assert code == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == kind


def test_what_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("{"))

    assert entry.main() == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "QuestionError"
