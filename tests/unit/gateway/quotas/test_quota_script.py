"""The script in Valkey does what the arithmetic in Python does, and neither gives away more than a limit allows."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.quotas_file import TenantQuota
from loraplex_gateway.quotas import script
from loraplex_gateway.quotas.ledger import MINUTE_S, NEVER, Ask, Ledger, Settlement, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMITS = st.none() | st.sampled_from([0, 1, 2, 7, 60, 6_000, 10**9])
ASKS = st.builds(
    Ask,
    num_requests=st.integers(1, 4),
    prompt_tokens=st.integers(1, 3_000),
    max_new_tokens=st.integers(1, 3_000),
)


@st.composite
def quotas(draw: st.DrawFn) -> TenantQuota:
    values: dict[str, int | None] = {"max_concurrent_requests": draw(st.none() | st.integers(0, 8))}
    for what in ("requests", "tokens"):
        rate = draw(LIMITS)
        values[f"{what}_per_minute"] = rate
        values[f"{what}_burst"] = draw(st.sampled_from([rate, 3, 5_000])) if rate else rate
    return TenantQuota(**values)


@st.composite
def settlements(draw: st.DrawFn) -> Settlement:
    tokens = float(draw(st.integers(-2_000, 2_000)))
    count = draw(st.integers(0, 3))
    return Settlement(tokens, draw(st.integers(count, 3_000)) if count else 0, count)


STEPS = st.lists(
    st.tuples(
        quotas(),
        settlements(),
        st.integers(0, 3),
        st.lists(ASKS, max_size=3),
        st.floats(0.0, 100.0),
        st.tuples(st.integers(0, 4), st.integers(0, 3_000)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture
def valkey(valkey_url: str) -> Iterator[redis.Redis]:
    with contextlib.closing(redis.Redis.from_url(valkey_url)) as client:
        yield client


def ask(
    valkey: redis.Redis,
    quota: TenantQuota,
    *asks: Ask,
    gateway: str = "g1",
    running: int = 0,
    settlement: Settlement | None = None,
    floor: tuple[float, float] = (0.0, 0.0),
    lent: tuple[int, int] = (0, 0),
) -> tuple[list[Verdict], Ledger]:
    names = script.keys("acme")
    used = script.Used(*lent, settlement or Settlement())
    given_words = script.arguments(gateway, running, used, floor, quota)
    words: list[Any] = [*given_words, *(word for each in asks for word in script.words(each))]
    reply: Any = valkey.eval(script.ADMIT, len(names), *names, *words)
    verdicts, ledger, _ = script.decode(reply)
    return verdicts, ledger


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_the_script_gives_the_verdicts_of_the_ledger(
    valkey: redis.Redis, steps: list[tuple[TenantQuota, Settlement, int, list[Ask], float, tuple[int, int]]]
) -> None:
    valkey.flushdb()
    model: Ledger | None = None
    for quota, settlement, running, asks, floor, lent in steps:
        verdicts, after = ask(
            valkey, quota, *asks, running=running, settlement=settlement, floor=(floor, floor), lent=lent
        )
        model = model or Ledger(at=after.at)
        model.advance(quota, after.at)
        model.requests, model.tokens = max(model.requests, floor), max(model.tokens, floor)
        model.requests += lent[0] if quota.requests_per_minute is not None else 0
        model.settle(Settlement(settlement.tokens + lent[1], settlement.output_tokens, settlement.num_outputs))
        for each, verdict in zip(asks, verdicts, strict=True):
            expected = model.admit(quota, each, running)
            running = expected.num_running
            assert_same(verdict, expected)
        assert after.requests == pytest.approx(model.requests, abs=1e-3)
        assert after.tokens == pytest.approx(model.tokens, abs=1e-3)
        assert after.mean_output == pytest.approx(model.mean_output)
        model = after  # what rounding left may decide the next comparison


def assert_same(verdict: Verdict, expected: Verdict) -> None:
    assert verdict.is_admitted == expected.is_admitted
    assert verdict.reserved_tokens == expected.reserved_tokens
    assert verdict.is_crowded == expected.is_crowded
    assert verdict.num_running == expected.num_running
    for name in ("requests_wait_s", "tokens_wait_s", "used_requests", "used_tokens"):
        assert getattr(verdict, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-3), name


@settings(max_examples=200, deadline=None)
@given(
    quota=quotas(),
    calls=st.lists(st.tuples(st.floats(0.0, 30.0), ASKS, st.floats(0.0, 2.0)), min_size=1, max_size=40),
)
def test_no_window_sees_more_than_the_burst_the_rate_and_one_debt(
    quota: TenantQuota, calls: list[tuple[float, Ask, float]]
) -> None:
    ledger, now = Ledger(at=0.0), 0.0
    used: list[tuple[float, int, int]] = []  # at, requests, tokens as settled
    for gap_s, wanted, share in calls:
        now += gap_s
        ledger.advance(quota, now)
        verdict = ledger.admit(quota, wanted, 0)
        if not verdict.is_admitted:
            continue
        spent = min(math.floor(verdict.reserved_tokens * share), wanted.prompt_tokens + wanted.max_new_tokens)
        ledger.settle(Settlement(float(spent - verdict.reserved_tokens), spent, 1))
        used.append((now, wanted.num_requests, spent))

    for limit, burst, column in (
        (quota.requests_per_minute, quota.requests_burst, 1),
        (quota.tokens_per_minute, quota.tokens_burst, 2),
    ):
        if limit is None or burst is None:
            continue
        assert limit or not used
        for first in range(len(used)):
            for last in range(first, len(used)):
                amounts = [int(entry[column]) for entry in used[first : last + 1]]
                allowed = burst + limit * (used[last][0] - used[first][0]) / MINUTE_S
                # Before the last call everything fits; the last one may go into debt.
                assert sum(amounts[:-1]) <= allowed + max(amounts) + 1


def test_a_limit_of_zero_never_admits_and_an_absent_one_always_does(valkey: redis.Redis) -> None:
    wanted = Ask(1, 10, 10)

    (requests,), _ = ask(valkey, TenantQuota(requests_per_minute=0, requests_burst=0), wanted)
    (tokens,), _ = ask(valkey, TenantQuota(tokens_per_minute=0, tokens_burst=0), wanted)
    (concurrent,), _ = ask(valkey, TenantQuota(max_concurrent_requests=0), wanted)
    free, _ = ask(valkey, TenantQuota(), *[wanted] * 50)

    assert (requests.requests_wait_s, tokens.tokens_wait_s, concurrent.is_crowded) == (NEVER, NEVER, True)
    assert all(verdict.is_admitted for verdict in free)


def test_nothing_is_reserved_unless_every_limit_leaves_enough(valkey: redis.Redis) -> None:
    quota = TenantQuota(requests_per_minute=10, requests_burst=10, tokens_per_minute=100, tokens_burst=100)

    ask(valkey, quota, Ask(1, 60, 20))
    (refused,), after = ask(valkey, quota, Ask(1, 60, 20))

    assert refused.tokens_wait_s == pytest.approx((80 + 80 - 100) * MINUTE_S / 100, abs=0.5)
    assert refused.requests_wait_s == 0
    assert after.requests <= 1
    assert after.tokens <= 80


def test_a_call_above_the_burst_goes_through_when_nothing_is_used_and_leaves_a_debt(valkey: redis.Redis) -> None:
    quota = TenantQuota(tokens_per_minute=100, tokens_burst=100)

    (large, small, again), _ = ask(valkey, quota, Ask(1, 300, 50), Ask(1, 1, 1), Ask(1, 300, 50))

    assert large.is_admitted
    assert small.tokens_wait_s == pytest.approx((350 + 2 - 100) * MINUTE_S / 100, abs=0.5)
    assert again.tokens_wait_s == pytest.approx(350 * MINUTE_S / 100, abs=0.5)


def test_an_output_without_a_limit_is_expected_to_be_as_long_as_the_tenants_are(valkey: redis.Redis) -> None:
    quota = TenantQuota(tokens_per_minute=10**6, tokens_burst=10**6)

    (unknown,), _ = ask(valkey, quota, Ask(1, 10, 8_000))
    (known,), _ = ask(valkey, quota, Ask(1, 10, 8_000), settlement=Settlement(0.0, 20 * 100, 100))
    (short,), _ = ask(valkey, quota, Ask(1, 10, 5))

    assert unknown.reserved_tokens == 10 + 256
    assert known.reserved_tokens == pytest.approx(10 + 20, abs=1)
    assert short.reserved_tokens == 15


def test_what_a_dead_gateway_ran_stops_counting_with_its_lease(
    valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = TenantQuota(max_concurrent_requests=2)
    ask(valkey, quota, Ask(2, 1, 1), gateway="dead")
    (crowded,), _ = ask(valkey, quota, Ask(1, 1, 1), gateway="other")

    valkey.zadd(script.GATEWAYS, {"dead": float(valkey.time()[0]) - 1})
    (free,), _ = ask(valkey, quota, Ask(2, 1, 1), gateway="other")

    assert crowded.is_crowded
    assert crowded.num_running == 2
    assert free.is_admitted
    assert valkey.hkeys(script.running_key("acme")) == [b"other"]


def test_a_raised_limit_counts_what_was_used_under_the_old_one(valkey: redis.Redis) -> None:
    ask(valkey, TenantQuota(tokens_per_minute=100, tokens_burst=100), Ask(1, 80, 20))

    (verdict,), _ = ask(valkey, TenantQuota(tokens_per_minute=1000, tokens_burst=1000), Ask(1, 850, 40))

    assert verdict.is_admitted


def test_what_is_kept_of_a_tenant_goes_away(valkey: redis.Redis) -> None:
    ask(valkey, TenantQuota(tokens_per_minute=100, tokens_burst=100), Ask(1, 80, 20))

    for key in (script.used_key("acme"), script.running_key("acme")):
        assert 0 < int(valkey.ttl(key)) <= script.KEEP_S + 120
