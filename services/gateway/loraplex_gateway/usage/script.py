"""Writes usage records so that each request has one, whatever is sent twice and however often it was resumed."""

from typing import Final

# KEYS: the stream, then one mark for each record. ARGV: the cap, then for each record: JSON, the call's id, when the call began,
# seconds that its mark is kept. A mark is "entry call,call... began began": where the request's record lies, which calls were
# added to it last, and when the first and the last of them began. A call that is among them is not added again; another one
# takes the record's place with both: times, page-seconds and tokens made are sums, and what ended it is the word of the call
# that began last, which may be written before the others': a gateway learns only in time that a stream went on elsewhere. The
# output is what was made, or what the client had of it if that is more: a gateway that was killed has not said what it made.
WRITE: Final = """
local most_calls = 64 * 17
local sums = {'generated_tokens', 'kv_page_s', 'adapter_page_s', 'queue_s', 'duration_s', 'calls', 'attempts', 'unmetered_attempts'}
local num_written = 0
for i = 2, #KEYS do
  local text, call, at, kept_s = ARGV[4 * i - 6], ARGV[4 * i - 5], tonumber(ARGV[4 * i - 4]), ARGV[4 * i - 3]
  local mark, calls, first_at, last_at = redis.call('GET', KEYS[i]), call, at, at
  local is_new = true
  if mark then
    local entry, before, first, last = string.match(mark, '^(%S+) (%S+) ?(%S*) ?(%S*)$')
    first_at, last_at = tonumber(first) or at, tonumber(last) or at
    is_new = not string.find(before, call, 1, true)
    if is_new then
      calls = string.sub(before .. ',' .. call, -most_calls)
      local found = redis.call('XRANGE', KEYS[1], entry, entry)
      if found[1] then
        local record, other = cjson.decode(text), cjson.decode(found[1][2][2])
        local cached_tokens = (at < first_at and record or other).cached_tokens
        if at < last_at then record, other = other, record end
        for _, name in ipairs(sums) do record[name] = (record[name] or 0) + (other[name] or 0) end
        record.input_tokens = math.max(record.input_tokens, other.input_tokens)
        record.output_tokens = math.max(record.output_tokens, other.output_tokens, record.generated_tokens)
        record.cached_tokens = cached_tokens
        text = cjson.encode(record)
        redis.call('XDEL', KEYS[1], entry)
      end
      first_at, last_at = math.min(first_at, at), math.max(last_at, at)
    end
  end
  if is_new then
    local entry = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'record', text)
    redis.call('SET', KEYS[i], string.format('%s %s %.3f %.3f', entry, calls, first_at, last_at), 'EX', kept_s)
    num_written = num_written + 1
  end
end
return num_written
"""
