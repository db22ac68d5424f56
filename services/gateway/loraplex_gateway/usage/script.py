"""Writes usage records so that each request has one, whatever is sent twice and however often it was resumed."""

from typing import Final

# KEYS: the stream, then one mark for each record. ARGV: the cap, then for each record: JSON, the call's id, seconds that its
# mark is kept. A mark is "entry call,call...": where the request's record lies and which calls are in it. A call that is in it
# is not added again; another one takes the record's place with both: times and page-seconds are sums, token counts are
# those of the whole output, and what ended it is the last call's word.
WRITE: Final = """
local sums = {'kv_page_s', 'adapter_page_s', 'queue_s', 'duration_s', 'calls', 'attempts', 'unmetered_attempts'}
local num_written = 0
for i = 2, #KEYS do
  local text, call, kept_s = ARGV[3 * i - 4], ARGV[3 * i - 3], ARGV[3 * i - 2]
  local mark, calls = redis.call('GET', KEYS[i]), call
  local is_new = true
  if mark then
    local at = string.find(mark, ' ', 1, true)
    local entry, before = string.sub(mark, 1, at - 1), string.sub(mark, at + 1)
    is_new = not string.find(before, call, 1, true)
    if is_new then
      calls = before .. ',' .. call
      local found = redis.call('XRANGE', KEYS[1], entry, entry)
      if found[1] then
        local record, first = cjson.decode(text), cjson.decode(found[1][2][2])
        for _, name in ipairs(sums) do record[name] = record[name] + first[name] end
        record.input_tokens = math.max(record.input_tokens, first.input_tokens)
        record.output_tokens = math.max(record.output_tokens, first.output_tokens)
        record.cached_tokens = first.cached_tokens
        text = cjson.encode(record)
        redis.call('XDEL', KEYS[1], entry)
      end
    end
  end
  if is_new then
    local entry = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'record', text)
    redis.call('SET', KEYS[i], entry .. ' ' .. calls, 'EX', kept_s)
    num_written = num_written + 1
  end
end
return num_written
"""
