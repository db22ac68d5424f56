"""The greatest users as metrics: series come and go, their sum stays all that was used, and none ever falls."""

from __future__ import annotations

import random

import pytest
from loraplex_common.usage_records import UsageRecord
from loraplex_gateway.metrics import top_usage
from loraplex_gateway.metrics.top_usage import TopUsage
from prometheus_client import CollectorRegistry

TOKENS = "loraplex_gateway_usage_tokens_total"


def record(tenant: str, num_output: int, adapter: str = "") -> UsageRecord:
    return UsageRecord(
        usage_id="u",
        request_id="r",
        trace_id="t",
        tenant=tenant,
        model="m",
        adapter=adapter,
        revision="",
        input_tokens=1,
        cached_tokens=0,
        output_tokens=num_output,
        kv_page_s=0.5,
        code="OK",
        reason="STOP",
        ended_at=0.0,
    )


def outputs(top: TopUsage) -> dict[tuple[str, str], float]:
    tokens, _ = top.collect()
    return {
        (sample.labels["tenant"].lstrip("\ue000"), sample.labels["adapter"].lstrip("\ue000")): sample.value
        for sample in tokens.samples
        if sample.labels["kind"] == "output"
    }


def test_the_greatest_users_are_shown_and_the_rest_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_usage, "SHOWN", 2)
    top = TopUsage(CollectorRegistry(), clock=lambda: 0.0)

    for tenant, count in (("a", 10), ("b", 1), ("c", 100), ("d", 5)):
        top.add(record(tenant, count))
    outputs(top)
    for tenant, count in (("a", 10), ("b", 1), ("c", 100)):
        top.add(record(tenant, count))

    # a was there from the first on, c came for b at the first scrape: what it used before is the others'.
    assert outputs(top) == {("a", ""): 20.0, ("c", ""): 100.0, ("other", "other"): 1.0 + 100.0 + 5.0 + 1.0}


def test_no_series_falls_and_the_sum_is_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_usage, "SHOWN", 3)
    monkeypatch.setattr(top_usage, "KNOWN", 8)
    now, draws, total = [0.0], random.Random(7), 0
    top = TopUsage(CollectorRegistry(), clock=lambda: now[0])
    before: dict[tuple[str, str], float] = {}

    for _ in range(300):
        count = draws.randrange(50)
        total += count
        top.add(record(f"t{draws.randrange(20)}", count))
        now[0] += draws.random() * 600
        if draws.random() < 0.3:
            after = outputs(top)
            assert len(after) <= 4
            assert sum(after.values()) == total
            assert all(after[pair] >= value for pair, value in before.items() if pair in after)
            before = after


@pytest.mark.parametrize(
    ("written", "label"),
    [("", ""), ("poet", "poet"), ("poet:prod", "poet"), (f"poet@{'a' * 64}", "poet"), ("a*0.5 + b", "(several)")],
)
def test_an_adapters_label_is_its_name(written: str, label: str) -> None:
    top = TopUsage(CollectorRegistry())

    top.add(record("a", 1, written))

    assert ("a", label) in outputs(top)
