"""What metrics, ledger and traces take by themselves is measured while they do what they do on a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_bench import observed_parts
from loraplex_bench.uncounted_gateway import COUNTING
from loraplex_common import valkey
from loraplex_common.usage_records import read_usage
from support.otlp_collector import running_collector

if TYPE_CHECKING:
    import pytest


async def test_each_part_is_at_work(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_GATEWAY_REDIS_URL", valkey_url)
    before = [getattr(kind, name) for kind, name in COUNTING]
    client = valkey.connect(valkey_url)

    with running_collector() as collector:
        arguments = observed_parts.parsed(
            ["--collector", collector.target, "--rounds", "1", "--requests", "3", "--tokens", "4"]
        )
        found = await observed_parts.measure(arguments)
    records = [record async for record in read_usage(client)]
    await client.aclose()

    assert list(found) == ["metrics", "ledger", "traces"]
    assert [getattr(kind, name) for kind, name in COUNTING] == before, "they count again"
    assert [record.output_tokens for record in records] == [4] * 8, "of a first request and three, twice"
    assert len(collector.spans) == 4
