#!lua name=celeriac1
-- The state of requests: one function library, named after the protocol's version. docs/architecture.md tells the
-- protocol; this file and its neighbours (concatenated in the order of kvstore.state.library.PARTS) enforce it.
--
-- Every function takes ONE key, cel:{sNN}:live, which routes the call to the slot of its shard (the registry's:
-- cel:{w}:workers). All other keys are computed from it and carry the same hash tag, so they are in the same slot.
--
--   key                        type    lifetime                    holds
--   cel:{sNN}:req:<rid>        hash    to its end, then 300 s      the record, fields below
--   cel:{sNN}:log:<rid>:<c>    stream  as its record               tokens of choice c: id <n after>-0; its end: <n>-1
--   cel:{sNN}:feed:<gateway>   stream  60 s, about 10,000 entries  hints: field d, packed list of FeedItem; may lose
--   cel:{sNN}:live             zset    for ever                    every request that is not final; score: when the
--                                                                  reaper must look, ms (never later than needed)
--   cel:{sNN}:dispatched       zset    for ever                    QUEUED requests; score: time of the last wake-up
--   cel:{sNN}:room             hash    for ever                    claims of the last seconds, bucket of repeats
--   cel:{sNN}:reaper           string  for ever                    "<last reap>:<grace until>"
--   cel:{sNN}:quarantine       stream  about 1,000 entries         records that nobody can read: rid, why
--   cel:{w}:workers            zset    for ever                    incarnations; score: end of the registry lease
--   cel:{w}:worker:<inc>       hash    60 s                        field beat: msgpack WorkerBeat
--
-- Fields of a record (times in ms of this server's TIME, stamps t: to the microsecond; m: what a worker measured):
-- schema state epoch owners "<token>=<lease end>,..." attempts crash_attempts deadline wake_n wakes wake_at woken_at
-- patience seed params prompt_ids tenant priority gateway model
-- k n:<c> h:<c> f:<c> reason phase body_hash meta t:<stamp> m:<worker>.
-- Prefix hashes are 63-bit and do not fit a Lua number: they are decimal strings, only ever compared.
local BUILD = 2
local SCHEMA = '1'
local LEASE_MS = 2000
local REAP_GAP_MS = 1000      -- nobody reaped for so long: an outage, give the owners one lease of grace
local MAX_CRASHES = 3
local FINAL_TTL_S = 300
local FEED_TTL_S = 60
local FEED_LEN = 10000
local LOOK_MS = 4000          -- a queued record is looked at this often
local MAX_QUEUE_TIME_MS = 30000

local FINAL = {FINISHED = true, FAILED = true, CANCELLED = true, EXPIRED = true}
local OPEN = {QUEUED = true, PREFILLING = true, DECODING = true}

-- clock: begin (the storms of tests/protocol replace this function, kvstore.state.library.with_test_clock)
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + t[2] / 1000
end
-- clock: end

-- One call's context: key prefix, time (whole ms, and as a stamp), feed hints and turns that it collects.
local function begin(keys)
  local at = now_ms()
  return {p = string.match(keys[1], '^(.*:)[^:]*$'), now = math.floor(at), at = string.format('%.3f', at), hints = {},
    turns = {}, expired = {}}
end

-- ------------------------------------------------------------------ msgpack, where cmsgpack has no word for it
local function bin(s)
  local n = #s
  if n < 256 then return string.char(0xc4, n) .. s end
  if n < 65536 then return string.char(0xc5, math.floor(n / 256), n % 256) .. s end
  return string.char(0xc6, math.floor(n / 16777216) % 256, math.floor(n / 65536) % 256, math.floor(n / 256) % 256,
    n % 256) .. s
end

local function array_of(items)
  local n = #items
  local head = n < 16 and string.char(0x90 + n) or string.char(0xdc, math.floor(n / 256), n % 256)
  return head .. table.concat(items)
end

-- ------------------------------------------------------------------ feed
local function hint(ctx, gateway, item)
  local items = ctx.hints[gateway]
  if items then items[#items + 1] = item else ctx.hints[gateway] = {item} end
end

local function hint_fin(ctx, gateway, rid, c, n, fin)
  hint(ctx, gateway, '\150' .. cmsgpack.pack(rid) .. cmsgpack.pack(c) .. cmsgpack.pack(n) .. '\0' .. bin('') .. bin(fin))
end

-- Writes the collected hints, one entry per gateway. pcall: a damaged feed costs a second of silence, not the call.
local function flush(ctx)
  for gateway, items in pairs(ctx.hints) do
    local key = ctx.p .. 'feed:' .. gateway
    redis.pcall('XADD', key, 'MAXLEN', '~', FEED_LEN, '*', 'd', array_of(items))
    redis.pcall('EXPIRE', key, FEED_TTL_S)
  end
end

-- ------------------------------------------------------------------ the record
local function owners_of(packed)
  local owners = {}
  for token, lease_end in string.gmatch(packed or '', '([^=,]+)=(%d+)') do owners[token] = tonumber(lease_end) end
  return owners
end

local function packed(owners)
  local parts = {}
  for token, lease_end in pairs(owners) do parts[#parts + 1] = string.format('%s=%.0f', token, lease_end) end
  return table.concat(parts, ',')
end

local function latest(owners)
  local last = 0
  for _, lease_end in pairs(owners) do if lease_end > last then last = lease_end end end
  return last
end

-- Score in `live`: `at`, but never after the deadline.
local function look_at(ctx, rec, at)
  redis.call('ZADD', ctx.p .. 'live', math.min(at, rec.deadline), rec.rid)
end

-- Enters a final state: ends each open choice's log, hints the feed, leaves `live` and the room, sets the TTLs.
-- The terminal event is exactly once because only this step makes it.
local function finish(ctx, rec, state, reason)
  local fin = cmsgpack.pack({state, reason, '', '', 0})
  local closed = {}
  for c = 0, rec.k - 1 do
    local log = ctx.p .. 'log:' .. rec.rid .. ':' .. c
    local r = redis.call('HMGET', rec.key, 'n:' .. c, 'f:' .. c)
    if not r[2] then
      redis.pcall('XADD', log, (r[1] or '0') .. '-1', 'f', fin)
      hint_fin(ctx, rec.gateway, rec.rid, c, tonumber(r[1] or 0), fin)
      closed[#closed + 1], closed[#closed + 2] = 'f:' .. c, '1'
    end
    redis.call('EXPIRE', log, FINAL_TTL_S)
  end
  redis.call('HSET', rec.key, 'state', state, 'owners', '', 'reason', reason, 'phase', string.lower(state),
    't:finished', ctx.at, unpack(closed))
  redis.call('EXPIRE', rec.key, FINAL_TTL_S)
  redis.call('ZREM', ctx.p .. 'live', rec.rid)
  redis.call('ZREM', ctx.p .. 'dispatched', rec.rid)
  rec.state, rec.owners, rec.reason = state, {}, reason
end

-- A readable record in any state, or nil and the reply GONE | BADREC(why, 1 if of a newer schema). With `c`, the fields
-- of that choice too.
local function read(ctx, rid, c)
  c = c or '0'
  local key = ctx.p .. 'req:' .. rid
  local r = redis.pcall('HMGET', key, 'schema', 'state', 'epoch', 'owners', 'deadline', 'gateway', 'k', 'n:' .. c,
    'h:' .. c, 'f:' .. c, 't:first_token', 'reason')
  if r.err then return nil, {'BADREC', key .. ' is no hash'} end
  if r[1] ~= SCHEMA then
    if r[1] then
      local newer = (tonumber(r[1]) or 0) > tonumber(SCHEMA)
      return nil, {'BADREC', 'schema ' .. r[1] .. ', expected ' .. SCHEMA, newer and 1 or 0}
    end
    if redis.call('EXISTS', key) == 0 then return nil, {'GONE'} end
    return nil, {'BADREC', 'no field schema'}
  end
  local rec = {rid = rid, key = key, state = r[2], epoch = tonumber(r[3]), deadline = tonumber(r[5]),
    gateway = r[6] or '', k = tonumber(r[7]), n = tonumber(r[8]), hash = r[9], fin = r[10], first = r[11],
    reason = r[12] or ''}
  if not (OPEN[rec.state] or FINAL[rec.state]) then return nil, {'BADREC', 'state ' .. tostring(r[2])} end
  if not (rec.epoch and rec.deadline and rec.k) then return nil, {'BADREC', 'epoch, deadline or k is no number'} end
  if not (rec.n and rec.hash) then return nil, {'BADREC', 'no choice ' .. c} end
  rec.owners = owners_of(r[4])
  return rec
end

local function final_reply(rec) return {'FINAL', rec.state, rec.reason} end

-- A record that is not final, or nil and the reply. Deadlines are enforced here, first thing in every function.
local function live(ctx, rid, c)
  local rec, reply = read(ctx, rid, c)
  if not rec then return nil, reply end
  if OPEN[rec.state] and ctx.now >= rec.deadline then
    finish(ctx, rec, 'EXPIRED', 'deadline_exceeded')
    ctx.expired[#ctx.expired + 1] = {rid, tonumber(redis.call('HGET', rec.key, 'wake_n') or 0)}
  end
  if FINAL[rec.state] then return nil, final_reply(rec) end
  return rec
end

-- The fence: nil if (epoch, token) may write; its lease then runs anew in rec.owners, for the caller to store.
-- A newer epoch than the record's proves that this server lost writes: the record adopts it.
local function refused(ctx, rec, epoch, token, state)
  if epoch > rec.epoch then
    rec.epoch, rec.state, rec.owners = epoch, state, {[token] = 0}
    redis.call('HSET', rec.key, 'epoch', epoch, 'state', state, 'phase', string.lower(state))
    redis.call('ZREM', ctx.p .. 'dispatched', rec.rid)
    look_at(ctx, rec, ctx.now + LEASE_MS)
  end
  if epoch ~= rec.epoch or not rec.owners[token] then return {'STALE', rec.epoch, rec.state} end
  -- Also when the lease is over: as long as nobody took over, it is still this owner's.
  rec.owners[token] = ctx.now + LEASE_MS
  return nil
end

local function counts(rec)
  local fields = {}
  for c = 0, rec.k - 1 do
    fields[#fields + 1] = 'n:' .. c
    fields[#fields + 1] = 'f:' .. c
  end
  local r, n, fin = redis.call('HMGET', rec.key, unpack(fields)), {}, {}
  for c = 1, rec.k do
    n[c], fin[c] = tonumber(r[2 * c - 1] or 0), r[2 * c] and 1 or 0
  end
  return n, fin
end

-- ------------------------------------------------------------------ the room: who is QUEUED waits for a claim
-- Milliseconds that a wake-up sent now may take to its claim: those in flight over the claims of the last 5 s.
local function queue_time_ms(ctx)
  if not ctx.queue_time then
    local claims, second = 0, math.floor(ctx.now / 1000)
    for _, slot in ipairs(redis.call('HMGET', ctx.p .. 'room', 's0', 's1', 's2', 's3', 's4', 's5', 's6', 's7')) do
      local at, n = string.match(slot or '', '^(%d+):(%d+)$')
      if at and tonumber(at) > second - 5 and tonumber(at) <= second then claims = claims + tonumber(n) end
    end
    ctx.num_dispatched = redis.call('ZCARD', ctx.p .. 'dispatched')
    ctx.queue_time = math.min(ctx.num_dispatched * 5000 / math.max(claims, 0.01), MAX_QUEUE_TIME_MS)
  end
  return ctx.queue_time
end

local function note_claim(ctx)
  local second = math.floor(ctx.now / 1000)
  local slot, n = 's' .. second % 8, 0
  local at, before = string.match(redis.call('HGET', ctx.p .. 'room', slot) or '', '^(%d+):(%d+)$')
  if tonumber(at) == second then n = tonumber(before) end
  redis.call('HSET', ctx.p .. 'room', slot, string.format('%.0f:%d', second, n + 1))
end

-- Looks are spread so that a long queue cannot fill the reaper's turn and delay a takeover: 250 a second.
local function look_interval_ms(ctx)
  queue_time_ms(ctx)
  return math.max(LOOK_MS, ctx.num_dispatched * 4)
end

-- One more wake-up. Its number follows the clock, so it is never used again even if FLUSHALL or a failover loses it.
-- Its patience is estimated now: estimated later, a shrinking queue makes every message look lost.
local function wake(ctx, rec, wakes)
  redis.call('ZADD', ctx.p .. 'dispatched', ctx.now, rec.rid)
  local wake_n = math.max(tonumber(redis.call('HGET', rec.key, 'wake_n') or 0) + 1, ctx.now)
  local wake_at = ctx.now + math.min(1000 * 2 ^ wakes, LOOK_MS)
  redis.call('HSET', rec.key, 'wake_n', wake_n, 'wakes', wakes + 1, 'woken_at', ctx.now, 'wake_at', wake_at,
    'patience', math.floor(2 * queue_time_ms(ctx)))
  look_at(ctx, rec, math.max(wake_at, ctx.now + ctx.num_dispatched * 4))
  ctx.turns[#ctx.turns + 1] = {rec.rid, wake_n}
end

-- Becomes QUEUED again, its tokens kept. The limit of the room is infinite: its turn comes at once.
local function requeue(ctx, rec)
  rec.state, rec.epoch, rec.owners = 'QUEUED', rec.epoch + 1, {}
  redis.call('HSET', rec.key, 'state', 'QUEUED', 'phase', 'queued', 'epoch', rec.epoch, 'owners', '')
  wake(ctx, rec, 0)
end

local function take_over(ctx, rec)
  local crashes = redis.call('HINCRBY', rec.key, 'crash_attempts', 1)
  if crashes >= MAX_CRASHES then
    finish(ctx, rec, 'FAILED', 'workers_lost')
  else
    requeue(ctx, rec)
  end
end
