"""Every query of every panel returns numbers, against a real Prometheus, once what it shows has happened."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import LoraplexError
from support import prometheus
from support.adapters import Recipe, write_adapter
from support.backend import kibibytes
from support.generation import greedy
from support.stack import Stack, StackFlags, running_stack
from support.stack_fixtures import import_all, write_tiny_world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from loraplex_client import AsyncClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy" / "grafana").glob("*.json"))
WARM = ("tiny-a", "tiny-b")
MAX_CONCURRENT = 16
QUIET_TIMEOUT_S = 20.0
EVENTS = (
    "loraplex_gateway_quota_refusals_total",
    "loraplex_gateway_aborts_total",
    "loraplex_gateway_queue_duration_seconds_count",
    "loraplex_gateway_usage_page_seconds_total",
    'loraplex_engine_adapter_evictions_total{cause="pressure"}',
    "loraplex_engine_evicted_blocks_total",
    "loraplex_engine_request_errors_total",
    "vllm:num_preemptions_total",
    'loraplex_store_imports_total{outcome!="ok"}',
)
"""What must have happened, for the test to show anything."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two engines with small pools, one gateway that lets few requests in at once and fewer onto engines."""
    folder = tmp_path_factory.mktemp("observed")
    model, adapters = write_tiny_world(folder)
    write_adapter(adapters / "broad", model, Recipe(rank=84))  # more than the pool holds
    quotas = folder / "quotas.toml"
    quotas.write_text(f"[default]\nmax_concurrent_requests = {MAX_CONCURRENT}\n")
    flags = StackFlags(
        engine=(
            "--pool-bytes",
            kibibytes(360),
            "--arena-bytes",
            kibibytes(480),
            "--max-num-seqs",
            "8",
            "--growth-quantile",
            "0",
        ),
        gateway=("--quotas-file", str(quotas), "--max-concurrent-requests", "12"),
    )
    with running_stack(tmp_path_factory.mktemp("stack"), model, adapters, flags) as stack:
        stack.start_engine()
        yield stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    import_all(stack)
    client = stack.client()
    yield client
    await client.close()


def queries() -> dict[str, str]:
    """Return every query by where it stands, with Grafana's variables filled in."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", "5m").replace("$__range", "1h")
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = re.sub(r"\$\w+", ".*", query)
    return found


async def refused(client: AsyncClient, adapter: str) -> None:
    with pytest.raises(LoraplexError):
        await greedy(client, adapter)


async def crowd(client: AsyncClient) -> None:
    """Ask for more at once than the tenant may, which is more than engines are given."""
    answers = await asyncio.gather(
        *(
            greedy(client, WARM[number % 2], 64, prompt_token_ids=range(number + 1, number + 49))
            for number in range(MAX_CONCURRENT + 8)
        ),
        return_exceptions=True,
    )
    assert any(isinstance(answer, LoraplexError) for answer in answers)
    assert any(isinstance(answer, list) for answer in answers)


async def drive(client: AsyncClient, broken: Path) -> None:
    """Do once what panels show: adapters that come and go, a crowd, refusals of each kind, an import that fails."""
    for adapter in ("tiny-a", "tiny-b", "tiny-c", "tiny-d", "tiny-e", None):
        await greedy(client, adapter, 24)
    await crowd(client)
    await refused(client, "broad")
    await refused(client, "nobody")
    with pytest.raises(LoraplexError):
        await client.adapters.import_directory("broken", broken)


def is_a_number(server: prometheus.Prometheus, query: str) -> bool:
    """Tell whether a query has a series whose value now is a number."""
    return any(not math.isnan(float(each["value"][1])) for each in server.query(query))


async def test_every_panels_query_returns_numbers(stack: Stack, client: AsyncClient, tmp_path: Path) -> None:
    services = {
        "gateway": stack.gateway,
        "adapter_store": stack.store,
        "engine-0": stack.engines[0],
        "engine-1": stack.engines[1],
    }
    broken = stack.import_root / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    targets = {job: service.addresses["metrics"] for job, service in services.items()}

    with prometheus.running_prometheus(tmp_path, targets) as server:
        for job in targets:
            server.eventually(f'process_cpu_seconds_total{{job="{job}"}}')
        server.eventually('loraplex_gateway_resumes_total{outcome="failed"} == 0')  # an alert counts from there
        await drive(client, broken)
        for event in EVENTS:
            server.eventually(f"sum({event}) > 0")
        await drive(client, broken)  # what began with the first is counted from a number that has been read

        async def silent() -> list[str]:
            return [where for where, query in queries().items() if not is_a_number(server, query)]

        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while still := await silent():
            assert time.monotonic() < deadline_s, "\n".join(still)
            await asyncio.sleep(0.2)
