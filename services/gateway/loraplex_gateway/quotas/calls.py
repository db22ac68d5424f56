"""One client's call and its tenant's quota: looked at before any work, reserved once its tokens are known, settled at its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_gateway.quotas.account import Account
from loraplex_gateway.quotas.accounts import Accounts
from loraplex_gateway.quotas.ledger import Ask, Verdict
from loraplex_gateway.quotas.refusal import headers, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.errors import TenantQuotaError
    from loraplex_common.quotas_file import QuotasFile
    from redis.asyncio import Redis

    from loraplex_gateway.quotas.refusal import Headers

CROWDED_MEMORY_S: Final = 0.1
"""How long a tenant that had too many requests under way on all gateways is refused without asking again."""


class TenantQuotas:
    """The quotas of all tenants on one gateway.

    Args:
        file: What they are; None if there are none.
        accounts: What has been used; None if there are none.
        on_refusal: Told tenant and limit (key of the quotas file) of each refusal.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        file: QuotasFile | None,
        accounts: Accounts | None,
        *,
        on_refusal: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self.accounts = accounts
        self._on_refusal = on_refusal
        self._clock = clock
        self._crowded_until: dict[str, float] = {}

    @classmethod
    def over(
        cls,
        file: QuotasFile | None,
        connect: Callable[[], Redis],
        gateway_id: str,
        on_refusal: Callable[[str, str], None],
    ) -> TenantQuotas:
        """Return the quotas of a file, kept in the Valkey that `connect` opens; without a file it opens none."""
        return cls(file, None if file is None else Accounts(connect(), gateway_id), on_refusal=on_refusal)

    def call(self, tenant: str, num_requests: int = 1) -> QuotaCall:
        """Return a call of so many requests, which is admitted as a whole; each of them takes a share of it."""
        if self._file is None or self.accounts is None:
            return QuotaCall(self, None, num_requests)
        quota = self._file.current().of(tenant)
        account = self.accounts.of(tenant, quota) if quota.limits_requests else None
        return QuotaCall(self, account, num_requests)

    async def run(self) -> None:
        """Share what is used with the other gateways, for ever."""
        if self.accounts is None:
            await asyncio.Event().wait()
        else:
            await self.accounts.run()

    async def close(self) -> None:
        """Say that nothing runs here any more."""
        if self.accounts is not None:
            await self.accounts.close()

    def known_refusal(self, account: Account, num_requests: int) -> TenantQuotaError | None:
        """Return the refusal of what is known here to be too much, without a word to Valkey."""
        quota, ledger, now = account.quota, account.ledger, self._clock()
        ledger.advance(quota, now)
        most, num_running = quota.max_concurrent_requests, account.num_running
        if most is not None and now < self._crowded_until.get(account.tenant, 0.0):
            num_running = max(num_running, most)
        requests_wait_s = ledger.requests_wait_s(quota, num_requests)
        is_crowded = most is not None and num_running + num_requests > most
        # A call that is refused anyway is told to come when it could be served: a request takes one token at least.
        asks_tokens = bool(requests_wait_s or is_crowded or quota.tokens_per_minute == 0)
        verdict = Verdict(
            reserved_tokens=0,
            requests_wait_s=requests_wait_s,
            tokens_wait_s=ledger.tokens_wait_s(quota, num_requests) if asks_tokens else 0.0,
            is_crowded=is_crowded,
            used_requests=ledger.requests,
            used_tokens=ledger.tokens,
            num_running=num_running,
            at=now,
        )
        return None if verdict.is_admitted else self.refusal(account, Ask(num_requests, 0, 0), verdict)

    def refusal(self, account: Account, ask: Ask, verdict: Verdict) -> TenantQuotaError:
        """Return the refusal of a verdict, counted."""
        error = refusal(account.tenant, account.quota, ask, verdict)
        for exceeded in error.exceeded:
            self._on_refusal(account.tenant, exceeded.limit)
        return error

    async def admit(self, account: Account, ask: Ask) -> Verdict:
        """Return the verdict on a call; what is reserved is given back by `release`."""
        assert self.accounts is not None  # or there would be no account
        verdict = await self.accounts.admit(account, ask)
        if verdict.is_crowded and account.num_running + ask.num_requests <= (
            account.quota.max_concurrent_requests or 0
        ):
            self._crowded_until[account.tenant] = self._clock() + CROWDED_MEMORY_S
        return verdict

    def release(self, account: Account, *, reserved: int, prompt_tokens: int, output_tokens: int) -> None:
        """End one request of an admitted call."""
        assert self.accounts is not None
        self._crowded_until.pop(account.tenant, None)
        self.accounts.release(account, reserved=reserved, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


class QuotaCall:
    """One call of a client. Its requests are admitted together: all of them, or none.

    Args:
        quotas: Decides.
        account: The tenant's; None if it has no limits.
        num_requests: How many requests the call is.
    """

    def __init__(self, quotas: TenantQuotas, account: Account | None, num_requests: int) -> None:
        self._quotas = quotas
        self._account = account
        self._num_requests = num_requests
        self._shares: list[QuotaShare] = []
        self._decided: asyncio.Future[Verdict] | None = None
        self._verdict: Verdict | None = None
        self._refusal: TenantQuotaError | None = None  # of all requests the same, and counted once

    def share(self) -> QuotaShare:
        """Return one request's part."""
        return QuotaShare(self)

    @property
    def is_limited(self) -> bool:
        """Whether the tenant has limits at all."""
        return self._account is not None

    @property
    def headers(self) -> Headers:
        """``x-ratelimit-*`` of the tenant, as of this call; nothing for one without limits."""
        if self._account is None:
            return ()
        if self._verdict is not None:
            return headers(self._account.quota, self._verdict.used_requests, self._verdict.used_tokens)
        return headers(self._account.quota, self._account.ledger.requests, self._account.ledger.tokens)

    def check(self) -> None:
        """Refuse before any work what is known to be too much.

        Raises:
            TenantQuotaError: If so.
        """
        if self._account is not None and self._refusal is None:
            self._refusal = self._quotas.known_refusal(self._account, self._num_requests)
        if self._refusal is not None:
            raise self._refusal

    async def join(self, share: QuotaShare) -> None:
        """Wait until all requests of the call have come, and for the verdict on them.

        Raises:
            TenantQuotaError: If the tenant's quota does not leave enough for all of them.
        """
        account = self._account
        if account is None:
            return
        self._shares.append(share)
        ask = Ask(
            self._num_requests,
            sum(each.prompt_tokens for each in self._shares),
            sum(each.max_new_tokens for each in self._shares),
        )
        if self._num_requests == 1:
            self._verdict = verdict = await self._quotas.admit(account, ask)
            if verdict.is_admitted:
                share.grant(account, verdict.reserved_tokens)
        else:
            verdict = await self._decide(account, ask)
        if not verdict.is_admitted:
            self._refusal = self._refusal or self._quotas.refusal(account, ask, verdict)
            raise self._refusal

    def release(self, account: Account, reserved: int, prompt_tokens: int, output_tokens: int) -> None:
        """End one request."""
        self._quotas.release(account, reserved=reserved, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    async def _decide(self, account: Account, ask: Ask) -> Verdict:
        """Return the verdict on all requests; the last one to come asks for it."""
        if self._decided is None:
            self._decided = asyncio.get_running_loop().create_future()
        if len(self._shares) < self._num_requests:
            await asyncio.wait({self._decided})  # which ends with its own cancellation only
            return self._decided.result()
        try:
            self._verdict = verdict = await self._quotas.admit(account, ask)
        except BaseException:
            self._decided.cancel()
            raise
        if verdict.is_admitted:
            left = verdict.reserved_tokens - ask.prompt_tokens
            for n, share in enumerate(self._shares):
                part = left * (n + 1) // self._num_requests - left * n // self._num_requests
                share.grant(account, share.prompt_tokens + part)
        self._decided.set_result(verdict)
        return verdict


@dataclass(slots=True)
class QuotaShare:
    """One request of a call, from its beginning to its end.

    Attributes:
        call: What it is part of.
        prompt_tokens: Once known.
        max_new_tokens: Most tokens of its output, once known.
    """

    call: QuotaCall
    prompt_tokens: int = 0
    max_new_tokens: int = 0
    _account: Account | None = None
    _reserved: int = 0
    _is_over: bool = False

    def check(self) -> None:
        """Refuse before any work what is known to be too much.

        Raises:
            TenantQuotaError: If so.
        """
        self.call.check()

    async def reserve(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Reserve what the request needs, together with the others of its call.

        Raises:
            TenantQuotaError: If the tenant's quota does not leave it.
        """
        self.prompt_tokens, self.max_new_tokens = prompt_tokens, max_new_tokens
        await self.call.join(self)

    def grant(self, account: Account, reserved: int) -> None:
        """Take note of what is reserved; if the request has ended meanwhile, it is given back."""
        if self._is_over:
            self.call.release(account, reserved, 0, 0)
        else:
            self._account, self._reserved = account, reserved

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        """End the request: replace what was reserved by what was used. Safe to call twice; the first one counts."""
        account, self._account, self._is_over = self._account, None, True
        if account is not None:
            self.call.release(account, self._reserved, prompt_tokens, output_tokens)
