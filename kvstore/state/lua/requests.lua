
-- ------------------------------------------------------------------ accept, attach, claim, handoff and the ends
-- Every function is safe to repeat with the same arguments: a caller without a reply does just that.

local function accept(keys, a)
  local ctx = begin(keys)
  local rid, body_hash = a[1], a[11]
  local rec, reply = read(ctx, rid)
  if not rec and reply[1] ~= 'GONE' then return reply end
  if rec then
    live(ctx, rid)
    flush(ctx)
    rec = read(ctx, rid)
    local r = redis.call('HMGET', rec.key, 'body_hash', 'wake_n')
    if r[1] ~= body_hash then return {'CONFLICT', rec.state, {}, {}} end
    local turns = {}
    if rec.state == 'QUEUED' and r[2] then turns[1] = {rid, tonumber(r[2])} end   -- the same number: no new wake-up
    return {'EXISTS', rec.state, (counts(rec)), turns}
  end
  local k = tonumber(a[10])
  local deadline = ctx.now + tonumber(a[2])
  local fields = {'schema', SCHEMA, 'state', 'QUEUED', 'epoch', 1, 'owners', '', 'attempts', 0, 'crash_attempts', 0,
    'deadline', deadline, 'seed', a[3], 'params', a[4], 'prompt_ids', a[5], 'tenant', a[6], 'priority', a[7],
    'gateway', a[8], 'model', a[9], 'k', k, 'body_hash', body_hash, 'meta', a[12], 'reason', '', 'phase', 'queued',
    't:queued', ctx.at, 'wake_n', 0}
  local n = {}
  for c = 0, k - 1 do
    fields[#fields + 1], fields[#fields + 2] = 'n:' .. c, 0
    fields[#fields + 1], fields[#fields + 2] = 'h:' .. c, '0'
    n[c + 1] = 0
    redis.call('UNLINK', ctx.p .. 'log:' .. rid .. ':' .. c)     -- a log without a record is nobody's
  end
  local key = ctx.p .. 'req:' .. rid
  for i = 1, #fields, 100 do redis.call('HSET', key, unpack(fields, i, math.min(i + 99, #fields))) end
  redis.call('PERSIST', key)
  wake(ctx, {rid = rid, key = key, deadline = deadline}, 0)
  return {'OK', 'QUEUED', n, ctx.turns}
end

local function attach(keys, a)
  local ctx = begin(keys)
  local _, reply = live(ctx, a[1])
  flush(ctx)
  if reply and reply[1] ~= 'FINAL' then return reply end
  local rec = read(ctx, a[1])
  if OPEN[rec.state] then redis.call('HSET', rec.key, 'gateway', a[2]) end
  local n, fin = counts(rec)
  return {'OK', rec.state, n, fin, rec.reason}
end

local function claim(keys, a)
  local ctx = begin(keys)
  local token, hedge, replicas = a[2], a[3] == '1', tonumber(a[4])
  local rec, reply = live(ctx, a[1])
  if not rec then flush(ctx) return reply end
  if not rec.owners[token] then
    local num_owners = 0
    for _ in pairs(rec.owners) do num_owners = num_owners + 1 end
    if rec.state == 'QUEUED' then
      rec.state, rec.epoch, rec.owners = 'PREFILLING', rec.epoch + 1, {}
      redis.call('HINCRBY', rec.key, 'attempts', 1)
      redis.call('HSET', rec.key, 'state', 'PREFILLING', 'phase', 'prefilling', 'epoch', rec.epoch, 't:claimed', ctx.at)
      redis.call('ZREM', ctx.p .. 'dispatched', rec.rid)
      note_claim(ctx)
    elseif not (hedge and rec.state == 'PREFILLING' and num_owners < replicas) then
      return {'BUSY', rec.state}
    end
  end
  rec.owners[token] = ctx.now + LEASE_MS
  redis.call('HSET', rec.key, 'owners', packed(rec.owners))
  look_at(ctx, rec, ctx.now + LEASE_MS)
  return {'OK', rec.deadline - ctx.now, redis.call('HGETALL', rec.key), ctx.turns}
end

-- Called by the receiver (or by a worker to itself). The epoch lets one of several through.
local function handoff(keys, a)
  local ctx = begin(keys)
  local from, to = a[3], a[4]
  local rec, reply = live(ctx, a[1])
  reply = reply or (not rec.owners[to] and refused(ctx, rec, tonumber(a[2]), from, 'PREFILLING')) or nil
  if reply then flush(ctx) return reply end
  if not rec.owners[to] then
    rec.state, rec.epoch, rec.owners = 'DECODING', rec.epoch + 1, {}
    redis.call('HSET', rec.key, 'state', 'DECODING', 'phase', 'decoding', 'epoch', rec.epoch, 't:handed', ctx.at)
  end
  rec.owners[to] = ctx.now + LEASE_MS
  redis.call('HSET', rec.key, 'owners', packed(rec.owners))
  look_at(ctx, rec, ctx.now + LEASE_MS)
  local n, fin = counts(rec)
  return {'OK', rec.epoch, n, fin}
end

local function release(keys, a)
  local ctx = begin(keys)
  local rec, reply = live(ctx, a[1])
  reply = reply or refused(ctx, rec, tonumber(a[2]), a[3], 'PREFILLING')
  if reply then flush(ctx) return reply end
  rec.owners[a[3]] = nil
  if next(rec.owners) then
    redis.call('HSET', rec.key, 'owners', packed(rec.owners))
  else
    requeue(ctx, rec)
  end
  return {'OK', rec.state, ctx.turns}
end

-- FAILED only: FINISHED comes with the last token's `fin`, so there is no window between the two. No adoption here.
local function fail(keys, a)
  local ctx = begin(keys)
  local rec, reply = live(ctx, a[1])
  if rec and (tonumber(a[2]) ~= rec.epoch or not rec.owners[a[3]]) then reply = {'STALE', rec.epoch, rec.state} end
  if not reply then finish(ctx, rec, 'FAILED', a[4]) end
  flush(ctx)
  return reply or {'OK'}
end

local function cancel(keys, a)
  local ctx = begin(keys)
  local rec, reply = live(ctx, a[1])
  if rec then
    local tokens = {}
    for token in pairs(rec.owners) do tokens[#tokens + 1] = token end
    reply = {'OK', rec.state, tonumber(redis.call('HGET', rec.key, 'wake_n') or 0), tokens, ctx.turns}
    finish(ctx, rec, 'CANCELLED', a[2])
  end
  flush(ctx)
  return reply
end

-- Display and timings only: the phase (not of a final record; '' keeps it) and spans that the caller measured.
local function phase(keys, a)
  local ctx = begin(keys)
  local _, reply = live(ctx, a[1])
  flush(ctx)
  if reply and reply[1] ~= 'FINAL' then return reply end
  local key = ctx.p .. 'req:' .. a[1]
  if not reply and a[2] ~= '' then redis.call('HSET', key, 'phase', a[2]) end
  for i = 3, #a, 2 do redis.call('HSET', key, 'm:' .. a[i], a[i + 1]) end
  return {'OK'}
end

redis.register_function{function_name = 'celeriac1_accept', callback = accept}
redis.register_function{function_name = 'celeriac1_attach', callback = attach, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_claim', callback = claim, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_handoff', callback = handoff, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_release', callback = release, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_finish', callback = fail, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_cancel', callback = cancel, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_phase', callback = phase, flags = {'allow-oom'}}
