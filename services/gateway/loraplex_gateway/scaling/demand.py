"""What waits for an engine: on this gateway, and, through Valkey, on all of them.

A request waits on one gateway, an autoscaler asks any of them. So each gateway says what waits on it, at once when that begins
and once a second while it lasts; a word that is older than `FRESH_S` is a dead gateway's.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import StoreUnavailableError
from loraplex_common.housekeeping import keep_doing
from loraplex_common.wake_up import WakeUp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from redis.asyncio import Redis

DEMAND_KEY: Final = "loraplex:gateway-demand"
"""Hash: gateway id -> ``MILLISECONDS JSON``; JSON maps a base model's fingerprint to requests and tokens."""
FRESH_S: Final = 5.0
SAY_EVERY_S: Final = 1.0
TIMEOUT_S: Final = 3.0

# KEYS: the hash. ARGV: a gateway's id, what waits there (empty: nothing), milliseconds that a word is good for. Returns what
# waits on the gateways whose word is good, and forgets the others'.
_EXCHANGE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[2] == '' then redis.call('HDEL', KEYS[1], ARGV[1])
else redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now) .. ' ' .. ARGV[2]) end
local said, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at = string.find(all[i + 1], ' ', 1, true)
  if now - tonumber(string.sub(all[i + 1], 1, at - 1)) > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[i])
  else said[#said + 1] = string.sub(all[i + 1], at + 1) end
end
return said
"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for an engine of one base model.

    Attributes:
        requests: How many.
        tokens: Their prompts' tokens, and those that they made before they lost an engine.
    """

    requests: int = 0
    tokens: int = 0


class Demand:
    """Requests of this gateway that no engine has, by the fingerprint of their base model."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._begun = WakeUp()

    @property
    def begun(self) -> asyncio.Event:
        """Set once a request begins to wait where none did; take it before looking."""
        return self._begun.next

    @contextmanager
    def waiting(self, fingerprint: str, num_tokens: int) -> Iterator[None]:
        """Count a request for as long as the block runs."""
        was_idle = not self._requests[fingerprint]
        self._requests[fingerprint] += 1
        self._tokens[fingerprint] += num_tokens
        if was_idle:
            self._begun.notify()
        try:
            yield
        finally:
            self._requests[fingerprint] -= 1
            self._tokens[fingerprint] -= num_tokens

    def said(self) -> str:
        """Return it as JSON; empty if nothing waits."""
        found = {each: (count, self._tokens[each]) for each, count in self._requests.items() if count}
        return json.dumps(found) if found else ""


class DemandBoard:
    """What waits on all gateways of a Valkey.

    Args:
        valkey: Client.
        gateway_id: This gateway's id.
        demand: What waits here.
    """

    def __init__(self, valkey: Redis, gateway_id: str, demand: Demand) -> None:
        self._gateway_id, self._demand = gateway_id, demand
        self._valkey = valkey
        self._is_known = False

    async def run(self) -> None:
        """Say what waits here, for ever."""
        await keep_doing(self._turn, name="saying what waits for engines", max_pause_s=FRESH_S / 2)

    async def waiting(self, fingerprint: str) -> Waiting:
        """Return what waits for engines of a base model, on all gateways.

        Raises:
            StoreUnavailableError: If Valkey does not answer.
        """
        requests = tokens = 0
        for text in await self._say():
            found = json.loads(text).get(fingerprint, (0, 0))
            requests, tokens = requests + found[0], tokens + found[1]
        return Waiting(requests, tokens)

    async def _turn(self) -> None:
        begun = self._demand.begun
        if self._is_known or self._demand.said():
            await self._say()
        with suppress(TimeoutError):
            await asyncio.wait_for(begun.wait(), SAY_EVERY_S if self._is_known else None)

    async def _say(self) -> list[str]:
        """Say what waits here; return what every gateway last said of itself.

        Raises:
            StoreUnavailableError: If Valkey does not answer in time; as its client, if it refuses.
        """
        mine = self._demand.said()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await self._valkey.eval(
                    _EXCHANGE, 1, DEMAND_KEY, self._gateway_id, mine, str(int(FRESH_S * 1000))
                )
        except TimeoutError:
            raise StoreUnavailableError(f"Valkey did not answer within {TIMEOUT_S:g} s", retry_after_s=1.0) from None
        self._is_known = bool(mine)
        return [each.decode() if isinstance(each, bytes) else str(each) for each in answer]
