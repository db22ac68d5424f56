"""Labels are capped and fairness is measured."""

from __future__ import annotations

import pytest
from loraplex_common.exposition import OTHER, Audience, Exposition
from loraplex_common.secret import Secret
from loraplex_gateway.metrics.gateway import JAIN_WINDOW_S, GatewayMetrics, LabelCap, ServiceShares
from prometheus_client import CollectorRegistry


def test_label_values_beyond_the_cap_share_one() -> None:
    cap = LabelCap(2)

    assert [cap(value) for value in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]


def test_jains_index_of_equal_shares_is_one_and_of_one_taker_one_over_n() -> None:
    now_s = [0.0]
    shares = ServiceShares(lambda: now_s[0])
    assert shares.jains_index() == 1.0

    shares.add("a", 10)
    shares.add("b", 10)
    assert shares.jains_index() == pytest.approx(1.0)
    shares.add("a", 1e9)
    assert shares.jains_index() == pytest.approx(0.5, abs=1e-3)

    now_s[0] += 3 * JAIN_WINDOW_S
    assert shares.jains_index() == 1.0


def test_the_names_are_those_of_the_contract() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.watch_queue(lambda: {2: 5})
    metrics.requests.labels("m", "a", "OK").inc()
    metrics.count_tokens("t", num_input=3, num_output=4, num_cached=1)

    exposition = Exposition(registry, audience=Audience(Secret("key")))
    text = exposition.render(authorization="Bearer key").body.decode()

    assert 'loraplex_gateway_requests_total{adapter="a",code="OK",model="m"} 1.0' in text
    assert 'loraplex_gateway_queue_size{priority="normal"} 5.0' in text
    assert 'loraplex_gateway_tokens_total{kind="output",tenant="t"} 4.0' in text
    assert 'loraplex_gateway_fairness_counter{tenant="t"} 11.0' in text
    for name in ("queue_duration_seconds", "ttft_seconds", "itl_seconds", "jains_index", "retries_total"):
        assert f"loraplex_gateway_{name}" in text
