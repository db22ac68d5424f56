"""Alert rules: each fires on series as its services would show them, alone, not before its time, and not on healthy ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prometheus import tool

ALERTS = Path(__file__).parents[3] / "deploy" / "prometheus" / "alerts.yaml"
RULES = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
GATEWAY = 'job="gateway",instance="g:8502"'
ENGINE = 'job="engine",instance="e:8521"'
STORE = 'job="adapter_store",instance="s:8511"'


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        series: Series -> its values of every minute, in promtool's notation.
        minute: When the alert must fire.
        before: When it must not fire yet; None where the first look at the fault may raise it.
    """

    series: Mapping[str, str]
    minute: int
    before: int | None = None


CASES = {
    "LoraplexNoEngine": Case({f'loraplex_gateway_engines{{{GATEWAY},is_used="true"}}': "2x5 0x10"}, 10, 6),
    "LoraplexGatewayErrors": Case(
        {
            f'loraplex_gateway_requests_total{{{GATEWAY},code="OK"}}': "0+95x30",
            f'loraplex_gateway_requests_total{{{GATEWAY},code="INTERNAL"}}': "0x10 5+5x20",
        },
        20,
        12,
    ),
    "LoraplexTimeToFirstTokenHigh": Case(
        {
            f'loraplex_gateway_ttft_seconds_bucket{{{GATEWAY},le="5"}}': "0+10x10 100+5x40",
            f'loraplex_gateway_ttft_seconds_bucket{{{GATEWAY},le="10"}}': "0+10x50",
            f'loraplex_gateway_ttft_seconds_bucket{{{GATEWAY},le="+Inf"}}': "0+10x50",
        },
        30,
        15,
    ),
    "LoraplexQueueGrows": Case({f'loraplex_gateway_queue_size{{{GATEWAY},priority="0"}}': "0x5 1+2x40"}, 25, 10),
    "LoraplexStreamsInterrupted": Case(
        {f'loraplex_gateway_resumes_total{{{GATEWAY},outcome="failed"}}': "0x5 1x10"}, 7, 4
    ),
    "LoraplexUsageRecordsDropped": Case(
        {f"loraplex_gateway_usage_records_dropped_total{{{GATEWAY}}}": "0x5 1x10"}, 7, 4
    ),
    "LoraplexProcessRestarts": Case(
        {
            f"process_start_time_seconds{{{ENGINE}}}": "0x5 100 200 300 300x10",
            f'loraplex_build_info{{{ENGINE},service="engine"}}': "1x20",
        },
        10,
        7,
    ),
    "LoraplexEngineErrors": Case(
        {f'loraplex_engine_request_errors_total{{{ENGINE},reason="ENGINE_HUNG"}}': "0x5 1+1x30"}, 15, 8
    ),
    "LoraplexPoolFull": Case({f'vllm:kv_cache_usage_perc{{{ENGINE},engine="0"}}': "0.5x5 0.99x30"}, 20, 10),
    "LoraplexPreemptions": Case({f'vllm:num_preemptions_total{{{ENGINE},engine="0"}}': "0x5 60+60x30"}, 25, 10),
    "LoraplexAdaptersThrash": Case(
        {
            f'loraplex_engine_adapter_evictions_total{{{ENGINE},cause="pressure"}}': "0x5 60+60x30",
            f'vllm:request_success_total{{{ENGINE},engine="0",finished_reason="stop"}}': "0+60x40",
        },
        25,
        10,
    ),
    "LoraplexAdapterLoadsFail": Case(
        {f'loraplex_engine_adapter_loads_total{{{ENGINE},outcome="refused"}}': "0x5 1+1x20"}, 12, 6
    ),
    "LoraplexStoreCorruption": Case({f"loraplex_store_verify_failures_total{{{STORE}}}": "0x5 1x10"}, 7, 4),
    "LoraplexStoreHasNoEngine": Case({f"loraplex_store_engines{{{STORE}}}": "2x5 0x20"}, 15, 8),
    "LoraplexImportsFail": Case({f'loraplex_store_imports_total{{{STORE},outcome="refused"}}': "0x5 1+1x20"}, 18, 7),
}
NO_GATEWAY_SEES_ENGINES = Case({f'loraplex_build_info{{{GATEWAY},service="gateway"}}': "1x10"}, 5, 0)
HEALTHY = {
    f'loraplex_gateway_engines{{{GATEWAY},is_used="true"}}': "2x60",
    f'loraplex_gateway_requests_total{{{GATEWAY},code="OK"}}': "0+100x60",
    f'loraplex_gateway_requests_total{{{GATEWAY},code="UNAVAILABLE"}}': "0+1x60",  # one in a hundred
    f'loraplex_gateway_requests_total{{{GATEWAY},code="INVALID_ARGUMENT"}}': "0+50x60",  # the callers' own
    f'loraplex_gateway_ttft_seconds_bucket{{{GATEWAY},le="5"}}': "0+100x60",
    f'loraplex_gateway_ttft_seconds_bucket{{{GATEWAY},le="+Inf"}}': "0+101x60",
    f'loraplex_gateway_queue_size{{{GATEWAY},priority="0"}}': "4 2 4 2x57",
    f'loraplex_gateway_resumes_total{{{GATEWAY},outcome="ok"}}': "0+1x60",
    f'loraplex_gateway_resumes_total{{{GATEWAY},outcome="failed"}}': "3x60",
    f"loraplex_gateway_usage_records_dropped_total{{{GATEWAY}}}": "7x60",
    f"process_start_time_seconds{{{ENGINE}}}": "0x30 100x30",
    f'loraplex_build_info{{{ENGINE},service="engine"}}': "1x60",
    f'loraplex_engine_request_errors_total{{{ENGINE},reason="ADAPTER_NOT_FOUND"}}': "0+5x60",
    f'vllm:kv_cache_usage_perc{{{ENGINE},engine="0"}}': "0.9x60",
    f'vllm:kv_cache_usage_perc{{{GATEWAY},engine="all"}}': "0.99x60",
    f'vllm:num_preemptions_total{{{ENGINE},engine="0"}}': "0+6x60",
    f'vllm:request_success_total{{{ENGINE},engine="0",finished_reason="stop"}}': "0+60x60",
    f'loraplex_engine_adapter_evictions_total{{{ENGINE},cause="pressure"}}': "0+6x60",
    f'loraplex_engine_adapter_loads_total{{{ENGINE},outcome="refused"}}': "2x60",
    f"loraplex_store_verify_failures_total{{{STORE}}}": "1x60",
    f"loraplex_store_engines{{{STORE}}}": "1x60",
    f'loraplex_store_imports_total{{{STORE},outcome="ok"}}': "0+10x60",
}


def firing(
    folder: Path, series: Mapping[str, str], expected: Mapping[int, list[str]]
) -> subprocess.CompletedProcess[str]:
    """Have promtool compare which alerts fire in a minute, -> their names."""
    looks: list[dict[str, Any]] = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
        }
        for minute, names in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": looks}
    path = folder / "test.yaml"  # JSON is YAML
    path.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    command = [tool("promtool"), "test", "rules", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_there_is_a_fault_for_every_alert() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_alone_on_its_fault_and_in_time(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    expected = {case.minute: [alert]} | ({} if case.before is None else {case.before: []})

    done = firing(tmp_path, case.series, expected)

    assert done.returncode == 0, done.stdout + done.stderr


def test_gateways_that_know_of_no_engine_raise_the_alert_too(tmp_path: Path) -> None:
    case = NO_GATEWAY_SEES_ENGINES

    done = firing(tmp_path, case.series, {case.before or 0: [], case.minute: ["LoraplexNoEngine"]})

    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_on_a_healthy_fleet(tmp_path: Path) -> None:
    done = firing(tmp_path, HEALTHY, {minute: [] for minute in range(5, 60, 5)})

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_that_should_fire_and_does_not_fails_these_tests(tmp_path: Path) -> None:
    done = firing(tmp_path, HEALTHY, {30: ["LoraplexPoolFull"]})

    assert done.returncode != 0
