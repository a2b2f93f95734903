
-- ------------------------------------------------------------------ append_batch, renew, refill
local function last_open_choice(rec, c)
  if rec.k == 1 then return true end
  local _, fin = counts(rec)
  for other = 1, rec.k do
    if fin[other] == 0 and other - 1 ~= c then return false end
  end
  return true
end

-- Writes tokens and end of one choice behind a prefix that was checked. Returns nil, or BADREC if the log is broken.
local function extend(ctx, rec, c, count, new_hash, tokens, fin, head)
  local log, n = ctx.p .. 'log:' .. rec.rid .. ':' .. c, rec.n + count
  if count > 0 then
    local r = redis.pcall('XADD', log, n .. '-0', 't', tokens)
    if type(r) == 'table' and r.err then return {'BADREC', log .. ': ' .. r.err} end
  end
  if fin ~= '' then
    local r = redis.pcall('XADD', log, n .. '-1', 'f', fin)
    if type(r) == 'table' and r.err then return {'BADREC', log .. ': ' .. r.err} end
  end
  hint(ctx, rec.gateway, head .. bin(tokens) .. bin(fin))
  rec.n = n
  local more = {}
  if fin ~= '' then more[1], more[2] = 'f:' .. c, '1' end
  if count > 0 and not rec.first then more[#more + 1], more[#more + 2] = 't:first_token', ctx.at end
  redis.call('HSET', rec.key, 'owners', packed(rec.owners), 'n:' .. c, n, 'h:' .. c, new_hash, unpack(more))
  if fin ~= '' and last_open_choice(rec, tonumber(c)) then
    local ok, entry = pcall(cmsgpack.unpack, fin)
    finish(ctx, rec, 'FINISHED', ok and type(entry) == 'table' and tostring(entry[2]) or '')
  end
  return nil
end

-- One item at a[i..i+11]: rid epoch token state c index prefix_hash new_hash count tokens fin head
local function append(ctx, a, i)
  local token, c = a[i + 2], a[i + 4]
  local rec, reply = live(ctx, a[i], c)
  if not rec then return reply end
  reply = refused(ctx, rec, tonumber(a[i + 1]), token, a[i + 3])
  if reply then return reply end
  local index = tonumber(a[i + 5])
  if rec.fin then
    reply = nil
  elseif index > rec.n then
    reply = {'GAP', rec.n}
  elseif index < rec.n then
    reply = {'DUP', rec.n}
  elseif a[i + 6] ~= rec.hash then
    reply = {'FORK'}
  else
    return extend(ctx, rec, c, tonumber(a[i + 8]), a[i + 7], a[i + 9], a[i + 10], a[i + 11])
  end
  redis.call('HSET', rec.key, 'owners', packed(rec.owners))
  return reply
end

-- Replies only for items that are not OK: {position from 0, reply}.
local function append_batch(keys, a)
  local ctx, replies = begin(keys), {}
  for i = 1, #a, 12 do
    local reply = append(ctx, a, i)
    if reply then replies[#replies + 1] = {(i - 1) / 12, reply} end
  end
  flush(ctx)
  return replies
end

-- Items of four: rid epoch token state. `live` is not moved: its score may be early, and the reaper then looks again.
local function renew(keys, a)
  local ctx, replies = begin(keys), {}
  for i = 1, #a, 4 do
    local rec, reply = live(ctx, a[i])
    reply = reply or refused(ctx, rec, tonumber(a[i + 1]), a[i + 2], a[i + 3])
    if reply then
      replies[#replies + 1] = {(i - 1) / 4, reply}
    else
      redis.call('HSET', rec.key, 'owners', packed(rec.owners))
    end
  end
  flush(ctx)
  return replies
end

-- A gateway puts back what this server lost: no owner needed, index and prefix hash decide.
-- Arguments: rid c index prefix_hash new_hash count tokens head
local function refill(keys, a)
  local ctx = begin(keys)
  local rec, reply = live(ctx, a[1], a[2])
  if rec then
    if rec.fin or tonumber(a[3]) ~= rec.n or a[4] ~= rec.hash then
      reply = {'AT', rec.n}
    else
      reply = extend(ctx, rec, a[2], tonumber(a[6]), a[5], a[7], '', a[8])
    end
  end
  flush(ctx)
  return reply or {'OK'}
end

redis.register_function{function_name = 'celeriac1_append_batch', callback = append_batch, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_renew', callback = renew, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_refill', callback = refill, flags = {'allow-oom'}}
