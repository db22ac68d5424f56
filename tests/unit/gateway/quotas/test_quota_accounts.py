"""Gateways count together through Valkey, and each on its own while there is none."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common import valkey
from loraplex_common.quotas_file import TenantQuota
from loraplex_common.tasks import cancel_and_wait
from loraplex_gateway.quotas import account as account_module
from loraplex_gateway.quotas import accounts as module
from loraplex_gateway.quotas import script
from loraplex_gateway.quotas.account import LENT
from loraplex_gateway.quotas.accounts import Accounts
from loraplex_gateway.quotas.ledger import Ask, Verdict
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey
    from loraplex_gateway.quotas.account import Account


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Valkey is there, take no busy machine for its absence."""
    if "valkey_url" in request.fixturenames:
        monkeypatch.setattr(module, "TIMEOUT_S", 10.0)


ONE = Ask(1, 10, 10)
TEN_REQUESTS = TenantQuota(requests_per_minute=10, requests_burst=10)
TWO_AT_ONCE = TenantQuota(max_concurrent_requests=2)
MANY_REQUESTS = 640
MANY = TenantQuota(
    requests_per_minute=10,
    requests_burst=MANY_REQUESTS,
    tokens_per_minute=100,
    tokens_burst=1_000_000,
    max_concurrent_requests=4 * MANY_REQUESTS,
)
TOKENS = TenantQuota(tokens_per_minute=1000, tokens_burst=1000)


@asynccontextmanager
async def gateway(url: str, name: str, *, is_killed: bool = False) -> AsyncIterator[Accounts]:
    """Run one gateway's accounts; one that is killed says nothing at its end."""
    accounts = Accounts(valkey.connect(url), name)
    running = asyncio.create_task(accounts.run())
    try:
        yield accounts
    finally:
        await cancel_and_wait(running)
        await (accounts._valkey.aclose() if is_killed else accounts.close())


@contextmanager
def paused(server: EmbeddedValkey) -> Iterator[None]:
    """Stop a server that keeps its connections, as a machine that hangs does."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def end(accounts: Accounts, account: Account, verdict: Verdict, used: int | None = None) -> None:
    tokens = verdict.reserved_tokens if used is None else used
    accounts.release(account, reserved=verdict.reserved_tokens, prompt_tokens=tokens, output_tokens=0)


async def has_said_all(accounts: Accounts) -> None:
    """Wait until Valkey has heard everything so far: turns come one after the other."""
    await accounts.admit(accounts.of("nobody", TEN_REQUESTS), ONE)


async def kept(url: str, key: str) -> dict[bytes, bytes]:
    client = valkey.connect(url)
    try:
        found: Any = await client.hgetall(key)
        return dict(found)
    finally:
        await client.aclose()


async def test_two_gateways_admit_together_what_one_may(valkey_url: str) -> None:
    async with gateway(valkey_url, "a") as a, gateway(valkey_url, "b") as b:
        calls = [g.admit(g.of("acme", TEN_REQUESTS), ONE) for _ in range(20) for g in (a, b)]

        verdicts = await asyncio.gather(*calls)

        assert sum(verdict.is_admitted for verdict in verdicts) == 10
        assert all(0 < v.requests_wait_s <= 6.1 for v in verdicts if not v.is_admitted)
        other = await a.admit(a.of("rival", TEN_REQUESTS), ONE)
        assert other.is_admitted


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what Valkey said for fresh on a busy machine, too."""
    monkeypatch.setattr(account_module, "FRESH_S", 60.0)


@pytest.mark.usefixtures("_fresh")
async def test_a_tenant_far_from_its_limits_does_not_wait_for_valkey_which_hears_of_it_all(valkey_url: str) -> None:
    async with gateway(valkey_url, "a") as a:
        account = a.of("acme", MANY)
        first = await a.admit(account, ONE)
        verdicts = [run_without_waiting(a.admit(account, ONE)) for _ in range(9)]
        for verdict in (first, *verdicts):
            end(a, account, verdict, used=30)
        await has_said_all(a)

        used = await kept(valkey_url, script.used_key("acme"))
        assert float(used[b"requests"]) == pytest.approx(10, abs=0.1)
        assert float(used[b"tokens"]) == pytest.approx(300, abs=5)
        assert await kept_is_empty(valkey_url)
        assert account.num_running == 0


async def test_gateways_that_do_not_ask_give_away_a_small_share_too_much_at_most(valkey_url: str) -> None:
    async with gateway(valkey_url, "a") as a, gateway(valkey_url, "b") as b:

        async def admitted_by(accounts: Accounts) -> int:
            account, admitted = accounts.of("acme", MANY), 0
            for _ in range(MANY_REQUESTS):
                admitted += (await accounts.admit(account, ONE)).is_admitted
            return admitted

        admitted = sum(await asyncio.gather(admitted_by(a), admitted_by(b)))

        assert MANY_REQUESTS <= admitted <= MANY_REQUESTS * (1 + 2 * LENT) + 2


@pytest.mark.usefixtures("_fresh")
async def test_what_was_given_without_asking_counts_on_while_valkey_is_away(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with gateway(server.url, "a") as a:
            account = a.of("acme", MANY)
            await a.admit(account, ONE)
            with paused(server):
                for _ in range(5):
                    run_without_waiting(a.admit(account, ONE))
                await eventually(lambda: not a._is_reached)
                assert account.ledger.requests == pytest.approx(6, abs=0.1)
            await eventually(lambda: a._is_reached and not account.is_apart)

            used = await kept(server.url, script.used_key("acme"))
            assert 5 <= float(used[b"requests"]) <= 11  # whether the turn that was lost had been taken cannot be known


def run_without_waiting(call: Coroutine[Any, Any, Verdict]) -> Verdict:
    """Return what a coroutine returns that awaits nothing; fails if it does."""
    with pytest.raises(StopIteration) as ended:
        call.send(None)
    verdict = ended.value.value
    assert isinstance(verdict, Verdict)
    return verdict


async def test_what_runs_on_one_gateway_counts_on_the_other_until_it_ends(valkey_url: str) -> None:
    async with gateway(valkey_url, "a") as a, gateway(valkey_url, "b") as b:
        on_a, on_b = a.of("acme", TWO_AT_ONCE), b.of("acme", TWO_AT_ONCE)
        first, second = await a.admit(on_a, ONE), await b.admit(on_b, ONE)
        assert not (await b.admit(on_b, ONE)).is_admitted

        end(a, on_a, first)

        async def is_admitted() -> bool:
            return (await b.admit(on_b, ONE)).is_admitted

        await eventually(is_admitted, timeout_s=2.0)
        end(b, on_b, second)
        end(b, on_b, second)
        await eventually(lambda: kept_is_empty(valkey_url))
        a.check_idle()
        b.check_idle()


async def kept_is_empty(url: str) -> bool:
    return not await kept(url, script.running_key("acme"))


async def test_one_request_at_a_time_is_never_crowded_by_its_predecessor(valkey_url: str) -> None:
    quota = TenantQuota(max_concurrent_requests=1)
    async with gateway(valkey_url, "a") as a:
        account = a.of("acme", quota)
        for _ in range(50):
            verdict = await a.admit(account, ONE)
            assert verdict.is_admitted
            end(a, account, verdict)


async def test_one_request_at_a_time_is_never_crowded_by_its_predecessor_elsewhere(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER_S", 60.0)
    one_at_once = TenantQuota(max_concurrent_requests=1)
    async with gateway(valkey_url, "one") as one, gateway(valkey_url, "two") as two:
        for n in range(6):
            accounts = (one, two)[n % 2]
            account = accounts.of("acme", one_at_once)
            verdict = await accounts.admit(account, ONE)
            assert verdict.is_admitted
            end(accounts, account, verdict)
            await asyncio.sleep(0.1)


async def test_what_is_not_used_is_given_back_and_what_is_used_beyond_is_charged(valkey_url: str) -> None:
    async with gateway(valkey_url, "a") as a, gateway(valkey_url, "b") as b:
        account = a.of("acme", TOKENS)
        verdict = await a.admit(account, Ask(1, 600, 300))
        end(a, account, verdict, used=100)
        await has_said_all(a)

        again = await b.admit(b.of("acme", TOKENS), Ask(1, 600, 100))
        assert again.is_admitted
        end(b, b.of("acme", TOKENS), again, used=1_600)
        await has_said_all(b)

        refused = await a.admit(account, Ask(1, 40, 10))
        assert refused.tokens_wait_s == pytest.approx((100 + 1_600 + 50 - 1_000) * 60 / 1_000, abs=2.0)


@pytest.mark.parametrize("num_turns", range(4))
async def test_a_call_that_is_given_up_while_it_waits_leaves_nothing(valkey_url: str, num_turns: int) -> None:
    async with gateway(valkey_url, "a") as a:
        account = a.of("acme", TEN_REQUESTS)
        for _ in range(10):
            waiting = asyncio.create_task(a.admit(account, ONE))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            if not waiting.cancelled():
                end(a, account, waiting.result())

        await eventually(lambda: not account.num_running)
        await eventually(lambda: kept_is_empty(valkey_url))


async def test_a_call_given_up_at_the_moment_of_its_verdict_leaves_nothing(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(valkey_url, "a") as a:
        account = a.of("acme", TOKENS)
        waiting = asyncio.create_task(a.admit(account, Ask(1, 500, 100)))
        hear = a._hear

        def hear_and_give_up(*words: Any) -> None:
            hear(*words)
            waiting.cancel()

        monkeypatch.setattr(a, "_hear", hear_and_give_up)
        await asyncio.wait({waiting})
        monkeypatch.undo()

        assert waiting.cancelled()
        assert account.num_running == 0
        whole = await a.admit(account, Ask(1, 900, 50))
        assert whole.is_admitted
        end(a, account, whole)


async def test_what_a_killed_gateway_ran_is_free_within_seconds_and_its_tokens_come_back_with_time(
    valkey_url: str,
) -> None:
    quota = TenantQuota(max_concurrent_requests=2, tokens_per_minute=6_000, tokens_burst=100)
    async with gateway(valkey_url, "other") as other:
        account = other.of("acme", quota)
        async with gateway(valkey_url, "killed", is_killed=True) as killed:
            verdict = await killed.admit(killed.of("acme", quota), Ask(2, 50, 50))
            assert verdict.is_admitted
        killed_at = time.monotonic()
        refused = await other.admit(account, ONE)
        assert refused.is_crowded
        assert refused.tokens_wait_s <= 1.0

        async def is_admitted() -> bool:
            return (await other.admit(account, ONE)).is_admitted

        await eventually(is_admitted)
        assert time.monotonic() - killed_at < 2 * script.LEASE_S


async def test_a_gateway_that_was_taken_for_dead_says_again_what_it_runs(valkey_url: str) -> None:
    client = valkey.connect(valkey_url)
    async with gateway(valkey_url, "slow") as slow, gateway(valkey_url, "other") as other:
        assert (await slow.admit(slow.of("acme", TWO_AT_ONCE), Ask(2, 1, 1))).is_admitted
        await client.delete(script.GATEWAYS, script.running_key("acme"))

        await eventually(lambda: kept(valkey_url, script.running_key("acme")), timeout_s=3 * module.BEAT_S)

        assert (await other.admit(other.of("acme", TWO_AT_ONCE), ONE)).is_crowded
    await client.aclose()


async def test_a_valkey_that_hangs_holds_up_nobody_and_each_gateway_counts_on_from_what_it_knows(
    tmp_path: Path,
) -> None:
    with running_server(tmp_path) as server:
        async with gateway(server.url, "a") as a, gateway(server.url, "b") as b:
            on_a, on_b = a.of("acme", TEN_REQUESTS), b.of("acme", TEN_REQUESTS)
            for _ in range(6):
                assert (await a.admit(on_a, ONE)).is_admitted
            assert (await b.admit(on_b, ONE)).is_admitted

            with paused(server):
                began = time.monotonic()
                alone = [await a.admit(on_a, ONE) for _ in range(6)]
                waited_s = time.monotonic() - began
                assert not a._is_reached

            assert waited_s < 5 * module.TIMEOUT_S, (
                "one of the six waits for Valkey; if each did, it would be six times as long"
            )
            # It knew of 6 of the 7: those of the other gateway since its own last word it cannot know.
            assert sum(verdict.is_admitted for verdict in alone) == 4
            await eventually(lambda: a._is_reached)
            # What was used meanwhile counts at every gateway.
            await eventually(lambda: not on_a.is_apart)
            assert not (await b.admit(on_b, ONE)).is_admitted


async def test_what_ended_while_valkey_was_away_is_not_given_back_twice(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with gateway(server.url, "a") as a:
            account = a.of("acme", TOKENS)
            verdict = await a.admit(account, Ask(1, 500, 200))
            with paused(server):
                assert (await a.admit(account, ONE)).is_admitted  # finds out
                end(a, account, verdict, used=0)
                assert account.ledger.tokens == pytest.approx(20, abs=10)
            await eventually(lambda: a._is_reached and not account.is_apart)

            refused = await a.admit(account, Ask(1, 500, 200))

            # Whether the reservation was given back there cannot be known: it drains as if it had been used.
            assert refused.tokens_wait_s == pytest.approx((700 + 700 - 1_000) * 60 / 1_000, abs=5.0)
