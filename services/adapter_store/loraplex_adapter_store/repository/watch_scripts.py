"""Lua scripts over what gateways have said they know. They run when memory is full, too: the keys are few and small."""

from __future__ import annotations

from typing import Final

from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

_PREFIX: Final = "loraplex:store:{watchers}:"
LEASES: Final = _PREFIX + "leases"
"""Sorted set of the names of watchers by the end of their leases, Unix time in ms by Valkey's clock."""
HOLDERS: Final = _PREFIX + "holders"
"""Hash: watcher -> fencing token of the replica that serves its newest stream."""
KNOWN: Final = _PREFIX + "known"
"""Hash: watcher -> ``{history_id} {sequence}`` of the last message that it has taken in."""
TOKENS: Final = _PREFIX + "tokens"
"""Counter of fencing tokens."""

_NOW: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

OPEN: Final = (
    ALLOWED_WHEN_FULL
    + _NOW
    + """
-- Registers a stream; one that the same watcher had elsewhere holds the lease no more.  Returns the fencing token.
-- KEYS: leases, holders, tokens.  ARGV: lease (ms), watcher
local token = redis.call('INCR', KEYS[3])
redis.call('HSET', KEYS[2], ARGV[2], token)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[2])
return token
"""
)

RENEW: Final = (
    ALLOWED_WHEN_FULL
    + _NOW
    + """
-- Renews leases that their holders still hold, or that were lost with Valkey; a newer stream's is left alone.
-- KEYS: leases, holders.  ARGV: lease (ms), then watcher and token of each
for i = 2, #ARGV, 2 do
  local holder = redis.call('HGET', KEYS[2], ARGV[i])
  if not holder or holder == ARGV[i + 1] then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[i])
  end
end
return 1
"""
)

CLOSE: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Ends the lease of a stream that has ended, unless a newer one holds it.
-- KEYS: leases, holders, known.  ARGV: watcher, token
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
return 1
"""
)

ACKNOWLEDGE: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Notes what a watcher has taken in; one without a lease is not waited for.
-- KEYS: leases, known.  ARGV: watcher, position
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
return redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
"""
)

LOOK: Final = (
    ALLOWED_WHEN_FULL
    + _NOW
    + """
-- Forgets the watchers whose leases have ended; returns the others, each with its position or ''.
-- KEYS: leases, holders, known
for _, watcher in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], watcher)
  redis.call('HDEL', KEYS[2], watcher)
  redis.call('HDEL', KEYS[3], watcher)
end
local found = {}
for _, watcher in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  found[#found + 1] = watcher
  found[#found + 1] = redis.call('HGET', KEYS[3], watcher) or ''
end
return found
"""
)
