"""Lua scripts over the catalog: each is one atomic step, and declares every key that it touches."""

from __future__ import annotations

from typing import Final

from loraplex_common.valkey_errors import ALLOWED_WHEN_FULL

COMMIT: Final = """
-- Replaces one adapter's record if nobody else changed it since it was read.
-- KEYS: adapter, index, sequence, changes, garbage, request, moves, then (revision, references) per added revision,
--       then references per removed revision, then bytes per tenant that the adapter concerns.
-- ARGV: expected version, new version, record, name, due (ms), changes kept, request answer, request ttl (ms),
--       number added, number removed, digests added..., digests removed..., new revision's record or '',
--       moves of labels (JSON array of strings) or '', moves kept, then the adapter's bytes and the limit (or -1) per tenant
if ARGV[7] ~= '' and redis.call('EXISTS', KEYS[6]) == 1 then
  return {'duplicate', redis.call('GET', KEYS[6])}
end
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if version ~= ARGV[1] then return {'conflict', version} end
local added, removed = tonumber(ARGV[9]), tonumber(ARGV[10])
local record = ARGV[11 + added + removed]
for i = 1, added do
  if record == '' and redis.call('EXISTS', KEYS[6 + 2 * i]) == 0 then return {'missing', ARGV[10 + i]} end
end
local shares = 13 + added + removed
local tenants = (#ARGV - shares) / 2
local function share(i) return KEYS[7 + 2 * added + removed + i], tonumber(ARGV[shares + 2 * i - 1]) end
for i = 1, tenants do
  local key, size = share(i)
  local limit, before = tonumber(ARGV[shares + 2 * i]), tonumber(redis.call('HGET', key, ARGV[4]) or '0')
  local others = tonumber(redis.call('HGET', key, '') or '0') - before
  -- What does not grow is never refused: a lowered limit takes nothing away.
  if limit >= 0 and size > before and others + size > limit then
    return {'quota', string.format('%d %d %d', i - 1, others, before)}
  end
end
for i = 1, tenants do
  local key, size = share(i)
  local before = tonumber(redis.call('HGET', key, ARGV[4]) or '0')
  if size > 0 then redis.call('HSET', key, ARGV[4], ARGV[shares + 2 * i - 1])
  else redis.call('HDEL', key, ARGV[4]) end
  if size ~= before then redis.call('HINCRBY', key, '', string.format('%d', size - before)) end
  if redis.call('HLEN', key) == 1 then redis.call('DEL', key) end
end
for i = 1, added do
  if record ~= '' then redis.call('SETNX', KEYS[6 + 2 * i], record) end
  redis.call('SADD', KEYS[7 + 2 * i], ARGV[4])
  redis.call('ZREM', KEYS[5], ARGV[10 + i])
end
for i = 1, removed do
  local references = KEYS[7 + 2 * added + i]
  redis.call('SREM', references, ARGV[4])
  if redis.call('SCARD', references) == 0 then redis.call('ZADD', KEYS[5], ARGV[5], ARGV[10 + added + i]) end
end
local moves = ARGV[12 + added + removed]
if moves ~= '' then
  for _, move in ipairs(cjson.decode(moves)) do redis.call('LPUSH', KEYS[7], move) end
  redis.call('LTRIM', KEYS[7], 0, tonumber(ARGV[13 + added + removed]) - 1)
end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'record', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[4])
local sequence = redis.call('INCR', KEYS[3])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[6], sequence .. '-0', 'name', ARGV[4])
if ARGV[7] ~= '' then redis.call('SET', KEYS[6], ARGV[7], 'PX', ARGV[8]) end
return {'ok', tostring(sequence)}
"""

READ: Final = """
-- Returns many adapters' records, nil for those that do not exist.  KEYS: adapters
local found = {}
for i = 1, #KEYS do found[i] = redis.call('HGET', KEYS[i], 'record') end
return found
"""
"""One command instead of one for each record: packing those takes longer than all else that a page takes."""

POSITION: Final = """
-- Returns the catalog's sequence, the server's run and its line of replication.  KEYS: sequence
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local line = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
return {redis.call('GET', KEYS[1]) or '0', run, line}
"""
"""INFO is read where it is written: sending and parsing both sections takes a store longer than the rest of a move."""

COUNT: Final = """
-- Counts an adapter's bytes for its tenants, as `COMMIT` does with every change, unless it has changed meanwhile.
-- KEYS: adapter, then bytes per tenant.  ARGV: version, name, bytes
if (redis.call('HGET', KEYS[1], 'version') or '0') ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local before = tonumber(redis.call('HGET', KEYS[i], ARGV[2]) or '0')
  redis.call('HSET', KEYS[i], ARGV[2], ARGV[3])
  redis.call('HINCRBY', KEYS[i], '', string.format('%d', tonumber(ARGV[3]) - before))
end
return 1
"""

RESERVE: Final = """
-- Keeps a revision that is being written from being collected until `due`; afterwards an abandoned write is garbage.
-- KEYS: collecting, garbage, references.  ARGV: digest, due (ms)
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if redis.call('SCARD', KEYS[3]) == 0 then redis.call('ZADD', KEYS[2], 'GT', ARGV[2], ARGV[1]) end
return 1
"""

REMOVE: Final = ALLOWED_WHEN_FULL + COMMIT
"""`COMMIT` for changes that free memory: they run even if no memory is left."""

POSTPONE: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Moves when a revision may be collected.  KEYS: garbage.  ARGV: digest, due (ms)
return redis.call('ZADD', KEYS[1], 'XX', ARGV[2], ARGV[1])
"""
)

PUBLISH: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Replaces what an engine holds: bounded by its memory, and what is not known to be held is collected.
-- KEYS: held.  ARGV: seconds to live, then digest and leases of each
redis.call('DEL', KEYS[1])
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""
)

ATTACH: Final = ALLOWED_WHEN_FULL + "return redis.call('SADD', KEYS[1], ARGV[1])"
"""KEYS: attached.  ARGV: engine id."""

BEGIN_COLLECTION: Final = (
    ALLOWED_WHEN_FULL
    + """
-- Takes a revision out of the catalog if it is due and nothing refers to it.
-- KEYS: garbage, references, collecting, revision, its text parts.  ARGV: digest, now (ms), lock (ms)
local due = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not due or tonumber(due) > tonumber(ARGV[2]) then return 0 end
if redis.call('SCARD', KEYS[2]) > 0 then redis.call('ZREM', KEYS[1], ARGV[1]) return 0 end
redis.call('SET', KEYS[3], '1', 'PX', ARGV[3])
redis.call('DEL', KEYS[4], KEYS[5])
-- Due again when the lock ends: whoever collects may die in between.
redis.call('ZADD', KEYS[1], tonumber(ARGV[2]) + tonumber(ARGV[3]), ARGV[1])
return 1
"""
)

CHANGE_FIELD: Final = """
-- Sets a field of a hash that exists.  KEYS: hash.  ARGV: field, value
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
"""

END_COLLECTION: Final = """
-- KEYS: garbage, collecting.  ARGV: digest
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
"""

START_AGAIN: Final = """
-- Replaces an operation that nothing else has replaced.  KEYS: operation.  ARGV: as it was read, as it begins, seconds to live
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""
