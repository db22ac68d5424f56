"""Which gateway runs which request: at most one each (tenant, request_id), claimed in Valkey under a lease.

A claim is as good as the gateway that holds it: each gateway says every second that it lives, and what a gateway claims that
has not for `LIVE_S` is free for others at once, whatever the lease says.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import DrainingError, LoraplexError, RequestRunningError
from loraplex_common.housekeeping import Trouble
from loraplex_common.registry import claim_key, gateway_key
from loraplex_common.tasks import deliver_cancellation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from redis.asyncio import Redis

LEASE_S: Final = 30.0
RENEW_S: Final = 10.0
LIVE_S: Final = 4.0
BEAT_S: Final = 1.0
# A claim is a safety net against duplicates: no request waits longer for it than this.
TIMEOUT_S: Final = 0.5
# After a failure Valkey is left alone so long, so that an outage does not cost every request its timeout.
PAUSE_S: Final = 2.0

_RELEASE: Final = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"
# Take or renew a claim that is free, ours or (if given) a gateway's that is gone; return its holder afterwards.
_TAKE: Final = """
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] and holder ~= ARGV[3] then return holder end
redis.call('set', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
"""


class Claim:
    """The claim of one request that runs on this gateway, by which it can be cancelled from elsewhere.

    Attributes:
        failure: What it ends with instead of CANCELLED, once it is cancelled.
        is_claimed: Whether its claim is known to have been in Valkey.
        find_resume_token: Returns its stream's token; empty as long as there is none.
    """

    def __init__(self) -> None:
        self.is_cancelled = self.is_claimed = False
        self.failure: LoraplexError | None = None
        self.find_resume_token: Callable[[], str] = str
        self._on_cancel: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End the request with finish reason CANCELLED."""
        self.is_cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def fail(self, error: LoraplexError) -> None:
        """End the request with an error, wherever it is."""
        self.failure = error
        self.cancel()

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Say how to wake the request from what it waits for at the moment."""
        self._on_cancel = callback
        if self.is_cancelled and callback is not None:
            callback()


class RequestClaims:
    """The requests of this gateway and their claims. Without Valkey claims hold on this gateway alone.

    Args:
        valkey: Client, or None for a gateway on its own.
        gateway_id: Value of the claims.

    Attributes:
        gateway_id: This gateway, as `owner` names it.
    """

    def __init__(self, valkey: Redis | None, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self._valkey = valkey
        self._gateway_id = gateway_id.encode()
        self._running: dict[tuple[str, str], Claim] = {}
        self._live_key = gateway_key(gateway_id)
        self._beat_at = -math.inf
        self._paused_until = 0.0
        self._releases: set[asyncio.Task[Any]] = set()
        self._trouble = Trouble()

    @property
    def num_running(self) -> int:
        """Claimed requests of this gateway."""
        return len(self._running)

    def find(self, tenant: str, request_id: str) -> Claim | None:
        """Return a running request of this gateway."""
        return self._running.get((tenant, request_id))

    async def owner(self, tenant: str, request_id: str) -> str | None:
        """Return the gateway that claims a request and lives, if Valkey knows one."""

        async def ask(valkey: Redis) -> Any:
            holder = await valkey.get(claim_key(tenant, request_id))
            return holder if isinstance(holder, bytes) and await _is_alive(valkey, holder) else None

        value = await self._ask(ask)
        return value.decode() if isinstance(value, bytes) else None

    @asynccontextmanager
    async def hold(
        self,
        tenant: str,
        request_id: str,
        *,
        takes_over: bool = False,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Claim]:
        """Claim a request for as long as the block runs.

        Args:
            tenant: The request's tenant.
            request_id: Its id.
            takes_over: End a request of this id that runs here, and have one that runs elsewhere end itself.
            meanwhile: Awaited while the claim is on its way, so that a request waits for one round trip and not for two.

        Raises:
            RequestRunningError: If a request of this id is running here or on another gateway, and is not taken over.
            LoraplexError: What ``meanwhile`` raises.
        """
        key = (tenant, request_id)
        before = self._running.get(key)
        if before is not None and not takes_over:
            raise _already_running(request_id, before.find_resume_token())
        running = self._running[key] = Claim()
        if before is not None:
            before.fail(_replaced(request_id))
        try:
            claim = self._claim(tenant, request_id, takes_over=takes_over)
            running.is_claimed = await (claim if meanwhile is None else _both(claim, meanwhile()))
            yield running
        finally:
            # Also when the claim itself was cut off half-way: the script removes no other gateway's claim. A request that
            # took over here holds it in this gateway's name.
            if self._running.get(key) is running:
                del self._running[key]
                self._release_soon(tenant, request_id)

    async def run(self) -> None:
        """Say for ever that this gateway lives, and renew the leases."""
        clock = asyncio.get_running_loop().time
        renewed_at = clock()
        while True:
            await self._ask(self._beat, is_beat=True)
            if clock() - renewed_at >= RENEW_S:
                renewed_at = clock()
                await self._renew()
            deliver_cancellation()
            await asyncio.sleep(BEAT_S)

    def hand_over(self) -> None:
        """End all requests of this gateway, which goes away; each is told how its client can go on with it."""
        for running in tuple(self._running.values()):
            running.fail(_draining(running.find_resume_token()))

    async def close(self) -> None:
        """Wait for the releases that are on their way, and say that this gateway is gone."""
        if self._releases:
            await asyncio.wait(set(self._releases), timeout=TIMEOUT_S)
        await self._ask(lambda valkey: valkey.delete(self._live_key))

    async def _claim(self, tenant: str, request_id: str, *, takes_over: bool) -> bool:
        """Claim a request; return whether Valkey knows."""
        name = claim_key(tenant, request_id)

        async def take(valkey: Redis) -> Any:
            if takes_over:
                await valkey.set(name, self._gateway_id, px=int(LEASE_S * 1000))
            if asyncio.get_running_loop().time() - self._beat_at > LIVE_S / 2:
                await self._beat(valkey)  # a claim of a gateway that is not known to live is void
            holder = await self._take(valkey, name)
            if holder == self._gateway_id or await _is_alive(valkey, holder):
                return holder
            return await self._take(valkey, name, instead_of=holder)

        holder = await self._ask(take)
        # Our own value without a local request: this command ran twice, or we restarted under the same id.
        if holder is not None and holder != self._gateway_id:
            raise _already_running(request_id)
        return holder is not None

    async def _renew(self) -> None:
        held = dict(self._running)

        async def renew(valkey: Redis) -> Any:
            async with valkey.pipeline(transaction=False) as pipeline:
                for tenant, request_id in held:
                    self._take(pipeline, claim_key(tenant, request_id))
                return await pipeline.execute()

        holders = await self._ask(renew, timeout_s=RENEW_S / 2) if held else None
        for (key, running), holder in zip(held.items(), holders or (), strict=False):
            if holder == self._gateway_id:
                running.is_claimed = True
            elif running.is_claimed:
                running.fail(_replaced(key[1]))  # one whose claim is still on its way may yet take over
        for tenant, request_id in set(held) - set(self._running):
            # It ended while it was renewed: the release may have come first.
            self._release_soon(tenant, request_id)

    def _take(self, valkey: Any, name: str, *, instead_of: bytes = b"") -> Any:
        """Send `_TAKE`; returns an awaitable, or what a pipeline returns."""
        return valkey.eval(_TAKE, 1, name, self._gateway_id, int(LEASE_S * 1000), instead_of)

    async def _beat(self, valkey: Redis) -> None:
        await valkey.set(self._live_key, b"1", px=int(LIVE_S * 1000))
        self._beat_at = asyncio.get_running_loop().time()

    def _release_soon(self, tenant: str, request_id: str) -> None:
        name = claim_key(tenant, request_id)
        task = asyncio.get_running_loop().create_task(
            self._ask(lambda valkey: valkey.eval(_RELEASE, 1, name, self._gateway_id))
        )
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _ask(
        self, command: Callable[[Redis], Awaitable[Any]], *, timeout_s: float = TIMEOUT_S, is_beat: bool = False
    ) -> Any:
        """Return a command's result, or None if Valkey is absent or down; a heartbeat is sent all the same."""
        loop = asyncio.get_running_loop()
        if self._valkey is None or (loop.time() < self._paused_until and not is_beat):
            return None
        try:
            async with asyncio.timeout(timeout_s):
                answer = await command(self._valkey)
        except (LoraplexError, TimeoutError) as error:
            self._paused_until = loop.time() + PAUSE_S
            self._trouble.warn(
                "claims cannot be written; they hold on this gateway only",
                cause=str(error) or f"no answer within {timeout_s:g} s",
            )
            return None
        self._trouble.over("claims are written again")
        return answer


async def _both(claim: Awaitable[bool], other: Awaitable[None]) -> bool:
    """Return what the claim comes to once both have ended: a claim still on its way would outlive its release."""
    claimed, done = await asyncio.gather(claim, other, return_exceptions=True)
    for outcome in (claimed, done):
        if isinstance(outcome, BaseException):
            raise outcome
    return bool(claimed)


async def _is_alive(valkey: Redis, gateway_id: bytes) -> bool:
    return bool(await valkey.exists(gateway_key(gateway_id.decode())))


def _already_running(request_id: str, resume_token: str = "") -> RequestRunningError:
    return RequestRunningError(
        f"request {request_id} is still running; resume it, wait for its end or use another request_id",
        metadata={"request_id": request_id} | ({"resume_token": resume_token} if resume_token else {}),
    )


def _replaced(request_id: str) -> RequestRunningError:
    return RequestRunningError(
        f"another call has resumed request {request_id} and goes on with it", metadata={"request_id": request_id}
    )


def _draining(resume_token: str) -> DrainingError:
    remedy = "resume the stream through another" if resume_token else "send the request to another"
    return DrainingError(
        f"this gateway goes away; {remedy}",
        metadata={"resume_token": resume_token} if resume_token else {},
        drop_reason="rejected-shutting-down",
    )
