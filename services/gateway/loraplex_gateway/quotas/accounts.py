"""Tenants' ledgers, kept in Valkey by all gateways together; while it is away each gateway counts on its own.

All that a gateway has to say or to ask goes out in turns: one round trip carries the calls that came since the last one,
what ended calls used, and how many run. So Valkey hears it in order, a count that is said replaces the one before, and a
busy gateway sends fewer commands, not more. Nothing is sent twice: a turn whose answer is lost may have been taken or not,
and giving tokens back twice would be worse than not at all, for what stays reserved drains like what was used.

A tenant that is far from its limits does not wait for its turn: its calls are admitted at once, out of what this gateway
knows, and said with what has ended (`Account.lend`).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.housekeeping import Trouble
from loraplex_common.tasks import deliver_cancellation
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from loraplex_gateway.quotas import script
from loraplex_gateway.quotas.account import Account, Said, Waiting
from loraplex_gateway.quotas.ledger import Ask, Ledger, Settlement, Verdict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from loraplex_common.quotas_file import TenantQuota
    from redis.asyncio import Redis

BEAT_S: Final = 1.0
TIMEOUT_S: Final = 0.5
"""No call waits longer for Valkey than this, and what is left of the turn before its own."""
PAUSE_S: Final = 1.0
LINGER_S: Final = 0.02
"""What has ended waits so long for a call that goes out anyway, which halves the commands of a gateway. A tenant that has as
many requests under way as it may does not wait: its next one would be refused elsewhere for a place that is free."""
BUSY: Final = 8
"""With so many requests under way, calls that come soon after each other share a turn:"""
REST: Final = 6.0
"""after one there is none for this x as long as it took, which is a few milliseconds until the gateway is short of time,"""
MAX_REST_S: Final = 0.02
"""and never longer than this."""


class Accounts:
    """The accounts of the tenants that have limits.

    Args:
        valkey: A client of its own, closed with the accounts: its commands are not repeated.
        gateway_id: Under which what runs here is counted.
        clock: Monotonic seconds.
    """

    def __init__(self, valkey: Redis, gateway_id: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        valkey.set_retry(Retry(NoBackoff(), 0))
        self._valkey = valkey
        self._gateway_id = gateway_id
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._changed: dict[str, Account] = {}
        self._woken = asyncio.Event()
        self._is_reached = True
        self._has_script = False
        self._is_lingering = False
        self._rested_at = self._beat_at = -math.inf
        self._num_running = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._trouble = Trouble(clock=clock)

    def of(self, tenant: str, quota: TenantQuota) -> Account:
        """Return a tenant's account, under the limits that hold now."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant, quota, Ledger(at=self._clock()))
        account.quota = quota
        return account

    async def admit(self, account: Account, ask: Ask) -> Verdict:
        """Reserve what a call needs, if its tenant's limits leave it; from then on it counts until `release`."""
        if not self._is_reached:
            return self._admit_alone(account, ask)
        if (verdict := account.lend(ask, self._clock())) is not None:
            self._count(account, ask.num_requests)
            self._changed[account.tenant] = account
            self._linger()
            return verdict
        waiting = Waiting(ask, asyncio.get_running_loop().create_future())
        account.waiting.append(waiting)
        self._change(account)
        try:
            return await waiting.verdict
        except asyncio.CancelledError:
            if waiting.verdict.done() and not waiting.verdict.cancelled():
                self._undo(account, ask, waiting.verdict.result())
            raise

    def release(self, account: Account, *, reserved: int, prompt_tokens: int, output_tokens: int) -> None:
        """Count one request of an admitted call as ended, and what it used instead of what was reserved for it."""
        self._count(account, -1)
        if self._is_reached:
            account.settlement.add(reserved=reserved, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        else:
            settlement = Settlement()
            settlement.add(reserved=reserved, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
            account.settle_alone(settlement, self._clock())
        self._changed[account.tenant] = account
        if account.is_full:  # the next request may come at once, through another gateway
            self._woken.set()
        else:
            self._linger()

    async def run(self) -> None:
        """Speak with Valkey for ever: at once when there is something to say, and else often enough to count as alive."""
        while True:
            await self._wait()
            deliver_cancellation()
            if self._is_reached:
                await self._turn()
            else:
                self._is_reached = await self._beat()
                if self._is_reached:
                    self._trouble.over("quotas are shared by all gateways again")
                    self._change_all()
            deliver_cancellation()

    async def close(self) -> None:
        """Say that nothing runs here any more."""
        for account in self._accounts.values():
            for waiting in account.take_waiting():
                waiting.verdict.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        try:
            if self._is_reached and self._accounts:
                await self._turn()
                async with asyncio.timeout(TIMEOUT_S):
                    await self._valkey.zrem(script.GATEWAYS, self._gateway_id)
        except (LoraplexError, TimeoutError) as error:
            self._trouble.warn("what ran here counts until its lease ends", cause=str(error))
        finally:
            await self._valkey.aclose()

    def check_idle(self) -> None:
        """Raise `RuntimeError` if a request that is over still counts."""
        running = {account.tenant: account.num_running for account in self._accounts.values() if account.num_running}
        if running or self._num_running:
            raise RuntimeError(f"quotas: {running} still count as running")

    async def _wait(self) -> None:
        """Wait until there is something to say, or it is time for a beat."""
        if not self._is_reached:
            await asyncio.sleep(PAUSE_S)
            return
        if self._num_running and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(BEAT_S, self._ring)
        await self._woken.wait()
        if self._num_running >= BUSY and (rest_s := self._rested_at - self._clock()) > 0:
            await asyncio.sleep(rest_s)
        self._woken.clear()

    async def _turn(self) -> None:
        """Say everything that has changed and give out the verdicts that come back."""
        changed, self._changed, self._is_lingering = self._changed, {}, False
        said = [
            Said(account, account.take_lent(), account.take_settlement(), account.take_waiting())
            for account in changed.values()
        ]
        now = self._clock()
        if said:
            replies = await self._ask(lambda: self._say(said, now))
            if replies is None:
                self._fall_back(said)
                return
            for part, reply in zip(said, replies, strict=True):
                self._hear(part, reply, now)
            ended_at = self._clock()
            self._rested_at = ended_at + min(REST * (ended_at - now), MAX_REST_S)
        is_due = self._num_running and now - self._beat_at >= BEAT_S
        if is_due and not await self._beat():
            self._fall_back([])

    async def _say(self, said: list[Said], now: float) -> list[Any]:
        # By its hash once Valkey has it; a turn that fails may mean that it has it no more.
        call = ("EVALSHA", script.ADMIT_HASH) if self._has_script else ("EVAL", script.ADMIT)
        commands = [(*call, *self._words(part, now)) for part in said]
        self._has_script = False
        if len(commands) == 1:
            replies = [await self._valkey.execute_command(*commands[0])]  # type: ignore[no-untyped-call]
        else:
            pipeline = self._valkey.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies = await pipeline.execute()
        self._has_script = True
        return replies

    def _words(self, part: Said, now: float) -> list[Any]:
        account, floor = part.account, (0.0, 0.0)
        if account.is_apart:
            # What was used while no other gateway heard of it.
            account.ledger.advance(account.quota, now)
            floor = (account.ledger.requests, account.ledger.tokens)
        names = script.keys(account.tenant)
        used = script.Used(part.lent.requests, part.lent.tokens, part.settlement)
        given = script.arguments(self._gateway_id, account.num_running, used, floor, account.quota)
        asked = [word for waiting in part.waiting for word in script.words(waiting.ask)]
        return [len(names), *names, *given, *asked]

    def _hear(self, said: Said, reply: list[bytes], asked_at: float) -> None:
        account = said.account
        verdicts, ledger, num_elsewhere = script.decode(reply)
        account.hear(ledger, num_elsewhere, asked_at)
        if verdicts:
            most = account.quota.max_concurrent_requests
            account.is_full = most is not None and verdicts[-1].num_running >= most
        for waiting, verdict in zip(said.waiting, verdicts, strict=True):
            if verdict.is_admitted:
                self._count(account, waiting.ask.num_requests)
            if waiting.verdict.cancelled():
                self._undo(account, waiting.ask, verdict)
            else:
                waiting.verdict.set_result(verdict)

    def _undo(self, account: Account, ask: Ask, verdict: Verdict) -> None:
        """Take back what was reserved for a call that no longer waits."""
        if verdict.is_admitted:
            self._count(account, -ask.num_requests)
            account.settlement.tokens -= verdict.reserved_tokens
            self._change(account)

    def _fall_back(self, said: list[Said]) -> None:
        """Go on alone: nothing of a turn that failed is said again, and waiting calls are answered from here."""
        self._is_reached = False
        now = self._clock()
        for part in said:
            part.account.settle_alone(part.settlement, now)
        waiting = [(part.account, each) for part in said for each in part.waiting]
        waiting += [(account, each) for account in self._accounts.values() for each in account.take_waiting()]
        for account in self._accounts.values():
            account.take_lent()  # it is in the ledger, which Valkey is told of when it is back
            account.settle_alone(account.take_settlement(), now)
        for account, each in waiting:
            if not each.verdict.done():
                each.verdict.set_result(self._admit_alone(account, each.ask))

    def _admit_alone(self, account: Account, ask: Ask) -> Verdict:
        verdict = account.admit_alone(ask, self._clock())
        if verdict.is_admitted:
            self._count(account, ask.num_requests)
        return verdict

    async def _beat(self) -> bool:
        """Say that this gateway lives; return whether Valkey took it."""
        self._beat_at = self._clock()
        is_new = await self._ask(lambda: self._valkey.eval(script.BEAT, 1, script.GATEWAYS, self._gateway_id))
        if is_new:
            self._change_all()
        return is_new is not None

    async def _ask(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Return a command's answer, or None if there is none in time."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await command()
        except (LoraplexError, TimeoutError) as error:
            self._trouble.warn(
                "Valkey does not answer: each gateway enforces the quotas on its own until it does", cause=str(error)
            )
            return None

    def _linger(self) -> None:
        if not self._is_lingering:
            self._is_lingering = True
            asyncio.get_running_loop().call_later(LINGER_S, self._woken.set)

    def _ring(self) -> None:
        self._alarm = None
        self._woken.set()

    def _count(self, account: Account, change: int) -> None:
        account.num_running += change
        self._num_running += change

    def _change(self, account: Account) -> None:
        self._changed[account.tenant] = account
        self._woken.set()

    def _change_all(self) -> None:
        for account in self._accounts.values():
            if account.num_running or account.is_apart:
                self._change(account)
