"""`ledger` as one script in Valkey: every limit of a tenant is looked at, and everything reserved, in one atomic step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

from loraplex_gateway.quotas.ledger import (
    FIRST_OUTPUT_TOKENS,
    NEVER,
    SMOOTHING,
    TOLERANCE,
    Ask,
    Ledger,
    Settlement,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.quotas_file import TenantQuota

_PREFIX: Final = "loraplex:quotas:{quotas}:"
GATEWAYS: Final = f"{_PREFIX}gateways"
"""Sorted set of gateway ids, scored by the time (unix seconds) until which what they run counts."""
LEASE_S: Final = 4.0
KEEP_S: Final = 86400
"""How long the mean output of a tenant that asks for nothing is remembered."""
_FIELDS: Final = 8
"""Words of a verdict."""


def used_key(tenant: str) -> str:
    """Hash of a `Ledger`: ``at`` (unix seconds), ``requests``, ``tokens``, ``mean_output``."""
    return f"{_PREFIX}used:{tenant}"


def running_key(tenant: str) -> str:
    """Hash of the requests under way: gateway id -> how many."""
    return f"{_PREFIX}running:{tenant}"


# The server's clock, so that gateways' need not agree. Numbers are written with all their digits.
ADMIT: Final = (
    ALLOWED_WHEN_FULL
    + f"""
-- KEYS: used, running, gateways.
-- ARGV: gateway, its requests under way, requests given already, tokens settled and given already, output tokens, outputs,
--       least requests used, least tokens used, requests per minute, burst, tokens per minute, burst, concurrent requests (each -1 for no limit),
--       then requests, prompt tokens and new tokens of each call.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local argument = {{0}}
for i = 2, #ARGV do argument[i] = tonumber(ARGV[i]) end
local kept = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens', 'mean_output')
local elapsed = math.max(0, now - (tonumber(kept[1]) or now))
local function drained(used, rate)
  if rate < 0 then return 0 end
  return math.max(0, used - elapsed * rate / 60)
end
local request_rate, request_burst, token_rate, token_burst, most = unpack(argument, 9, 13)
local requests = math.max(drained(tonumber(kept[2]) or 0, request_rate), argument[7])
local tokens = math.max(drained(tonumber(kept[3]) or 0, token_rate), argument[8])
if request_rate >= 0 then requests = requests + argument[3] end
tokens = math.max(0, tokens + argument[4])
local mean = tonumber(kept[4]) or {FIRST_OUTPUT_TOKENS}
if argument[6] > 0 then
  mean = mean + (1 - (1 - {SMOOTHING}) ^ argument[6]) * (argument[5] / argument[6] - mean)
end
local mine, others = argument[2], 0
local running = most >= 0 and redis.call('HGETALL', KEYS[2]) or {{}}
for i = 1, #running, 2 do
  if running[i] ~= ARGV[1] then
    if tonumber(redis.call('ZSCORE', KEYS[3], running[i]) or '0') < now then
      redis.call('HDEL', KEYS[2], running[i])
    else
      others = others + tonumber(running[i + 1])
    end
  end
end
local function wait(used, cost, rate, burst)
  if rate < 0 then return 0 end
  if rate == 0 then return -1 end
  local excess = used + math.min(cost, burst) - burst
  if excess > {TOLERANCE} then return excess * 60 / rate end
  return 0
end
local reply = {{}}
local function say(...)
  for _, value in ipairs({{...}}) do reply[#reply + 1] = string.format('%.17g', value) end
end
for i = 14, #ARGV, 3 do
  local count, prompt, output = argument[i], argument[i + 1], argument[i + 2]
  local cost = prompt + math.min(output, count * math.ceil(mean))
  local request_wait = wait(requests, count, request_rate, request_burst)
  local token_wait = wait(tokens, cost, token_rate, token_burst)
  local crowded = (most >= 0 and mine + others + count > most) and 1 or 0
  if request_wait == 0 and token_wait == 0 and crowded == 0 then
    if request_rate >= 0 then requests = requests + count end
    if token_rate >= 0 then tokens = tokens + cost end
    mine = mine + count
  end
  say(cost, request_wait, token_wait, crowded, requests, tokens, mine + others, now)
end
say(now, requests, tokens, mean, others)
redis.call('HSET', KEYS[1], 'at', string.format('%.17g', now), 'requests', string.format('%.17g', requests),
  'tokens', string.format('%.17g', tokens), 'mean_output', string.format('%.17g', mean))
local full = math.max(requests / math.max(request_rate, 1), tokens / math.max(token_rate, 1)) * 60
redis.call('EXPIRE', KEYS[1], math.ceil(math.min(full, 1e9)) + {KEEP_S})
if mine > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], string.format('%d', mine))
  redis.call('EXPIRE', KEYS[2], {KEEP_S})
else
  redis.call('HDEL', KEYS[2], ARGV[1])
end
redis.call('ZADD', KEYS[3], now + {LEASE_S}, ARGV[1])
return reply
"""
)

ADMIT_HASH: Final = hashlib.sha1(ADMIT.encode(), usedforsecurity=False).hexdigest()
"""What Valkey knows the script by once it has run it."""

BEAT: Final = (
    ALLOWED_WHEN_FULL
    + f"""
-- Says that a gateway lives; returns 1 if it was taken for dead, so that what it runs must be said again.
-- KEYS: gateways.  ARGV: gateway
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', time[1])
return redis.call('ZADD', KEYS[1], tonumber(time[1]) + {LEASE_S}, ARGV[1])
"""
)


def keys(tenant: str) -> list[str]:
    """Return what `ADMIT` touches."""
    return [used_key(tenant), running_key(tenant), GATEWAYS]


@dataclass(frozen=True, slots=True)
class Used:
    """What a gateway tells of calls that it has admitted, and of those that have ended.

    Attributes:
        lent_requests: Given without asking.
        lent_tokens: Reserved without asking.
    """

    lent_requests: int
    lent_tokens: int
    settlement: Settlement


def arguments(
    gateway_id: str, num_running: int, used: Used, floor: tuple[float, float], quota: TenantQuota
) -> list[Any]:
    """Return the arguments of `ADMIT` but for the calls.

    Args:
        gateway_id: The gateway that asks.
        num_running: Requests of the tenant under way there.
        used: What it has not told yet.
        floor: Least requests and tokens to take for used.
        quota: The limits.
    """
    limits = (
        *(quota.requests_per_minute, quota.requests_burst, quota.tokens_per_minute, quota.tokens_burst),
        quota.max_concurrent_requests,
    )
    ended = used.settlement
    return [
        *(gateway_id, num_running, used.lent_requests, used.lent_tokens + ended.tokens),
        *(ended.output_tokens, ended.num_outputs, *floor),
        *(-1 if limit is None else limit for limit in limits),
    ]


def words(ask: Ask) -> tuple[int, int, int]:
    """Return a call as arguments of `ADMIT`."""
    return (ask.num_requests, ask.prompt_tokens, ask.max_new_tokens)


def decode(reply: Sequence[bytes]) -> tuple[list[Verdict], Ledger, int]:
    """Return what `ADMIT` answered.

    It is a verdict for each call, the ledger after them in the server's time, and the requests under way on other gateways
    (0 where there is no limit to them).
    """
    numbers = [float(word) for word in reply]
    *said, at, requests, tokens, mean_output, others = numbers
    verdicts = [_verdict(said[n : n + _FIELDS]) for n in range(0, len(said), _FIELDS)]
    return verdicts, Ledger(at=at, requests=requests, tokens=tokens, mean_output=mean_output), round(others)


def _verdict(fields: Sequence[float]) -> Verdict:
    cost, requests_wait_s, tokens_wait_s, crowded, used_requests, used_tokens, num_running, at = fields
    return Verdict(
        reserved_tokens=math.floor(cost),
        requests_wait_s=NEVER if requests_wait_s < 0 else requests_wait_s,
        tokens_wait_s=NEVER if tokens_wait_s < 0 else tokens_wait_s,
        is_crowded=bool(crowded),
        used_requests=used_requests,
        used_tokens=used_tokens,
        num_running=round(num_running),
        at=at,
    )
