"""What one gateway knows of a tenant, gives it before Valkey hears of it, and asks for it."""

from __future__ import annotations

import asyncio

import pytest
from loraplex_common.quotas_file import TenantQuota
from loraplex_gateway.quotas.account import LENT, Account, Waiting
from loraplex_gateway.quotas.ledger import Ask, Ledger

ONE = Ask(1, 10, 10)
LIMIT = 640
SHARE = round(LENT * LIMIT)


def account_of(quota: TenantQuota) -> Account:
    """Return an account that Valkey has just said to be unused."""
    account = Account("acme", quota, Ledger(at=0.0))
    account.hear(Ledger(at=0.0), 0, asked_at=0.0)
    return account


def lend_all(account: Account) -> int:
    """Take what is given at once; return how many requests that was."""
    given = 0
    while account.lend(ONE, 0.0) is not None:
        account.num_running += 1
        given += 1
    return given


@pytest.mark.parametrize(
    "quota",
    [
        TenantQuota(requests_per_minute=LIMIT, requests_burst=LIMIT),
        TenantQuota(tokens_per_minute=LIMIT * 20, tokens_burst=LIMIT * 20),
        TenantQuota(max_concurrent_requests=LIMIT),
    ],
    ids=["requests", "tokens", "concurrency"],
)
def test_no_more_than_one_share_is_given_until_valkey_has_answered(quota: TenantQuota) -> None:
    account = account_of(quota)
    assert lend_all(account) == SHARE

    account.take_lent()  # on its way: another gateway may be given all that is left meanwhile

    assert lend_all(account) == 0
    account.hear(Ledger(at=0.0, requests=SHARE, tokens=SHARE * 20), 0, asked_at=0.0)
    assert lend_all(account) == SHARE


@pytest.mark.parametrize("limit", [0, 1, 31])
def test_a_small_limit_is_never_given_without_asking(limit: int) -> None:
    for quota in (
        TenantQuota(requests_per_minute=600, requests_burst=limit),
        TenantQuota(tokens_per_minute=600, tokens_burst=limit),
        TenantQuota(max_concurrent_requests=limit),
    ):
        assert account_of(quota).lend(ONE, 0.0) is None


def test_a_rate_of_nothing_gives_nothing_however_large_its_burst() -> None:
    assert account_of(TenantQuota(requests_per_minute=0, requests_burst=LIMIT)).lend(ONE, 0.0) is None


def test_an_account_is_full_only_until_valkey_hears_that_requests_have_ended() -> None:
    account = account_of(TenantQuota(max_concurrent_requests=LIMIT))
    account.num_running = LIMIT - 4
    account.hear(Ledger(at=0.0), 4, asked_at=0.0)
    assert account.is_full

    account.num_running = 3  # what follows is given without asking, and no verdict comes any more
    account.hear(Ledger(at=0.0), 4, asked_at=0.0)

    assert not account.is_full


async def test_a_call_that_was_given_up_takes_no_place_from_the_next_one() -> None:
    account = account_of(TenantQuota(max_concurrent_requests=1))
    given_up, next_one = (Waiting(ONE, asyncio.get_running_loop().create_future()) for _ in range(2))
    account.waiting += [given_up, next_one]
    given_up.verdict.cancel()

    assert account.take_waiting() == [next_one]
    assert account.take_waiting() == []
