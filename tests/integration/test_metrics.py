"""What readers make of our metrics: a real Prometheus, its linter, and the routers that go by vLLM's names."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import prometheus, routers
from support.generation import greedy
from support.stack import Stack, assert_idle
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client.core import Metric
    from support.processes import ServiceProcess

pytestmark = pytest.mark.integration

METRICS_DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
SECTIONS = {"gateway": "## Gateway", "adapter_store": "## Adapter store", "engine": "## Engine"}
DASHBOARD = [  # what vLLM's Grafana dashboard plots, each for one `model_name`
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    *(f"vllm:{name}_bucket" for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds")),
    *(f"vllm:{name}_bucket" for name in ("inter_token_latency_seconds", "request_prompt_tokens")),
    *(f"vllm:{name}_bucket" for name in ("request_generation_tokens", "request_params_max_tokens")),
    *(f"vllm:request_{name}_time_seconds_sum" for name in ("queue", "prefill", "decode", "inference")),
]
# A gauge whose name is older than this test; all others raise no complaint.
KNOWN = "loraplex_gateway_fairness_counter metric name should not include type 'counter'"
# Names that vLLM gave, against the linter's taste.
VLLM_TASTE = ("metric names should not contain ':'", 'non-counter metrics should not have "_total" suffix')


@pytest.fixture
async def used_stack(tiny_stack: Stack) -> AsyncIterator[Stack]:
    """A stack that has answered with one adapter, which is on the device now."""
    import_all(tiny_stack)
    client = tiny_stack.client()
    adapter = await client.adapters.get("tiny-a")
    assert adapter.latest is not None
    await client.adapters.alias("tiny-a", "prod", adapter.latest.digest)
    await greedy(client, "tiny-a", 4)
    yield tiny_stack
    await client.adapters.alias("tiny-a", "prod", "")
    await client.close()
    await assert_idle(tiny_stack.engines[0])


def services(stack: Stack) -> dict[str, ServiceProcess]:
    return {"gateway": stack.gateway, "adapter_store": stack.store, "engine": stack.engines[0]}


def address(service: ServiceProcess) -> str:
    return service.addresses["metrics"]


def read(service: ServiceProcess, **headers: str) -> str:
    request = urllib.request.Request(f"http://{address(service)}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as page:
        text: str = page.read().decode()
    return text


def families(service: ServiceProcess) -> dict[str, Metric]:
    """Return the families of a page by full name."""
    found = text_string_to_metric_families(read(service))
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in found}


def test_a_real_prometheus_stores_what_vllms_dashboard_asks_for(used_stack: Stack, tmp_path: Path) -> None:
    targets = {job: address(service) for job, service in services(used_stack).items()}

    with prometheus.running_prometheus(tmp_path, targets) as server:
        for job, engine in (("engine", "0"), ("gateway", "all")):
            labels = f'job="{job}",model_name="tiny",engine="{engine}"'
            server.eventually(f"vllm:num_requests_running{{{labels}}}")
            missing = [name for name in DASHBOARD if not server.query(f"{name}{{{labels}}}")]
            assert not missing, f"{job}: {missing}"
            (info,) = server.query(f"vllm:lora_requests_info{{{labels}}}")
            assert {"tiny-a", "tiny-a:prod"} <= set(info["metric"]["running_lora_adapters"].split(","))
        assert not server.query('{__name__=~"vllm_.*"}')
        for job in targets:
            for name in ("loraplex_build_info", "process_resident_memory_bytes", "process_start_time_seconds"):
                assert server.eventually(f'{name}{{job="{job}"}}')


@pytest.mark.parametrize("name", SECTIONS)
def test_promtool_finds_no_fault_with_our_names(used_stack: Stack, name: str) -> None:
    complaints = prometheus.lint(read(services(used_stack)[name]))

    ours = [line for line in complaints if not (line.startswith("vllm:") and line.endswith(VLLM_TASTE))]
    assert set(ours) <= {KNOWN}


@pytest.mark.parametrize("router", [routers.gaie, routers.llm_d])
@pytest.mark.parametrize("name", ["gateway", "engine"])
@pytest.mark.parametrize("model", ["tiny-a", "tiny-a:prod"])
def test_routers_find_an_adapter_under_the_name_that_clients_use(
    used_stack: Stack, router: routers.Router, name: str, model: str
) -> None:
    state = router(read(services(used_stack)[name]))

    assert state.affinity(model) == 1.0
    assert state.affinity("tiny-nobody") < 1.0
    assert state.max_active > 0
    assert (state.block_size, state.num_blocks) > (0, 0)
    if router is routers.llm_d:
        assert state.loaded[model] == "gpu"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_exported_metric_is_documented_as_it_is(used_stack: Stack, name: str) -> None:
    exported = families(services(used_stack)[name])

    documented = _documented(SECTIONS[name]) | _documented("## All three")
    assert set(exported) == set(documented)
    for full_name, family in exported.items():
        kind, labels = documented[full_name]
        assert family.type == kind, full_name
        seen = {label for sample in family.samples for label in sample.labels} - {"le"}
        hidden = {"model_name", "engine"} if full_name.startswith("vllm:") else set()  # said once, above the tables
        assert seen <= labels | hidden, full_name
        if family.samples:
            assert seen == labels | hidden, full_name


def _documented(section: str) -> dict[str, tuple[str, set[str]]]:
    """Return name -> (type, labels) of one table."""
    text = METRICS_DOC.read_text().partition(section)[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): (row[1], set(row[2].replace("`", "").replace(",", " ").split())) for row in rows}
