
-- ------------------------------------------------------------------ reap: takeover, expiry, repeated wake-ups; evict
local SCAN = 256
local AUDIT = 64
local BUCKET_SIZE = 50        -- repeats of wake-ups that may come at once; `rate` a second after that

-- Time until which nobody is taken over. A gap in reaping (outage, failover, clock jump) starts a grace of one lease:
-- the owners renew first, and no crash is counted for an outage.
local function grace_until(ctx)
  local last, grace = string.match(redis.call('GET', ctx.p .. 'reaper') or '', '^(%d+):(%d+)$')
  last, grace = tonumber(last) or 0, tonumber(grace) or 0
  if math.abs(ctx.now - last) > REAP_GAP_MS then grace = ctx.now + LEASE_MS end
  redis.call('SET', ctx.p .. 'reaper', string.format('%.0f:%.0f', ctx.now, grace))
  return grace, ctx.now < last - REAP_GAP_MS
end

-- The clock went back: lease ends and looks that lie too far ahead are cut to one lease from now.
local function pull_back(ctx)
  local far = redis.call('ZRANGEBYSCORE', ctx.p .. 'live', ctx.now + 4 * LEASE_MS, '+inf')
  for _, rid in ipairs(far) do
    local rec = read(ctx, rid)
    if rec and OPEN[rec.state] then
      for token, lease_end in pairs(rec.owners) do
        rec.owners[token] = math.min(lease_end, ctx.now + LEASE_MS)
      end
      redis.call('HSET', rec.key, 'owners', packed(rec.owners))
      if rec.state == 'QUEUED' then redis.call('HSET', rec.key, 'wake_at', ctx.now, 'woken_at', ctx.now) end
      look_at(ctx, rec, ctx.now + LEASE_MS)
    end
  end
  for _, rid in ipairs(redis.call('ZRANGEBYSCORE', ctx.p .. 'dispatched', '(' .. ctx.now, '+inf')) do
    redis.call('ZADD', ctx.p .. 'dispatched', ctx.now, rid)
  end
end

-- Token bucket: all repeats of this shard together, `rate` a second.
local function may_repeat(ctx)
  if not ctx.bucket then
    local at, left = string.match(redis.call('HGET', ctx.p .. 'room', 'bucket') or '', '^(%d+):([%d.]+)$')
    at, left = tonumber(at) or 0, tonumber(left) or BUCKET_SIZE
    ctx.bucket = math.min(left + math.max(ctx.now - at, 0) * ctx.rate / 1000, BUCKET_SIZE)
  end
  if ctx.bucket < 1 then return false end
  ctx.bucket = ctx.bucket - 1
  return true
end

local function quarantine(ctx, rid, why)
  redis.call('XADD', ctx.p .. 'quarantine', 'MAXLEN', '~', 1000, '*', 'rid', rid, 'why', why)
  redis.call('ZREM', ctx.p .. 'live', rid)
  redis.call('ZREM', ctx.p .. 'dispatched', rid)
end

-- One entry of `live` whose time has come.
local function look(ctx, rid, grace)
  local rec, reply = live(ctx, rid)
  if not rec then
    if reply[1] ~= 'BADREC' then
      redis.call('ZREM', ctx.p .. 'live', rid)
    elseif reply[3] == 1 then
      redis.call('ZADD', ctx.p .. 'live', ctx.now + LOOK_MS, rid)          -- a newer version's: its reaper cares for it
    else
      quarantine(ctx, rid, reply[2])
    end
  elseif rec.state == 'QUEUED' then
    if redis.call('ZSCORE', ctx.p .. 'dispatched', rid) then
      look_at(ctx, rec, ctx.now + look_interval_ms(ctx))         -- its repeats are the audit's
    else
      wake(ctx, rec, 0)                                          -- the room had lost it
    end
  else
    local over = latest(rec.owners)
    if over >= ctx.now then
      look_at(ctx, rec, over + 1)
    elseif ctx.now < grace then
      look_at(ctx, rec, grace)
    else
      take_over(ctx, rec)
    end
  end
end

-- The oldest wake-ups: a place held for nobody is given back, a message that got lost is sent again.
local function audit(ctx, idle)
  for _, rid in ipairs(redis.call('ZRANGE', ctx.p .. 'dispatched', 0, AUDIT - 1)) do
    local rec, reply = live(ctx, rid)
    if not rec or rec.state ~= 'QUEUED' then
      if not (reply and reply[3] == 1) then redis.call('ZREM', ctx.p .. 'dispatched', rid) end
    else
      local r = redis.call('HMGET', rec.key, 'wake_at', 'woken_at', 'patience', 'wakes')
      local wake_at, woken_at = tonumber(r[1]) or 0, tonumber(r[2]) or 0
      if ctx.now >= wake_at and (idle or ctx.now - woken_at > (tonumber(r[3]) or 0)) and may_repeat(ctx) then
        wake(ctx, rec, tonumber(r[4]) or 0)
      end
    end
  end
end

-- Arguments: idle ("1": the broker's queue was empty and a hand was free for a second), rate of repeats a second.
local function reap(keys, a)
  local ctx = begin(keys)
  ctx.rate = tonumber(a[2])
  local grace, went_back = grace_until(ctx)
  if went_back then pull_back(ctx) end
  for _, rid in ipairs(redis.call('ZRANGEBYSCORE', ctx.p .. 'live', '-inf', ctx.now, 'LIMIT', 0, SCAN)) do
    look(ctx, rid, grace)
  end
  audit(ctx, a[1] == '1')
  if ctx.bucket then redis.call('HSET', ctx.p .. 'room', 'bucket', string.format('%.0f:%.3f', ctx.now, ctx.bucket)) end
  flush(ctx)
  return {ctx.turns, ctx.expired}
end

-- The end of an incarnation is PROVEN: its sequences need not wait for their leases, and no grace holds.
local function evict(keys, a)
  local ctx, num_requests = begin(keys), 0
  local start, rids = a[1] .. '.', {}
  for from = 0, redis.call('ZCARD', ctx.p .. 'live'), SCAN do
    for _, rid in ipairs(redis.call('ZRANGE', ctx.p .. 'live', from, from + SCAN - 1)) do
      local packed_owners = redis.pcall('HGET', ctx.p .. 'req:' .. rid, 'owners')
      if type(packed_owners) == 'string' and string.find(',' .. packed_owners, ',' .. start, 1, true) then
        rids[#rids + 1] = rid
      end
    end
  end
  for _, rid in ipairs(rids) do
    local rec = live(ctx, rid)
    if rec then
      num_requests = num_requests + 1
      for token in pairs(rec.owners) do
        if string.sub(token, 1, #start) == start then rec.owners[token] = nil end
      end
      if next(rec.owners) then
        redis.call('HSET', rec.key, 'owners', packed(rec.owners))
      else
        take_over(ctx, rec)
      end
    end
  end
  flush(ctx)
  return {ctx.turns, num_requests}
end

redis.register_function{function_name = 'celeriac1_reap', callback = reap, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_evict', callback = evict, flags = {'allow-oom'}}
