
-- ------------------------------------------------------------------ registry of workers: routing only, never a proof
local function heartbeat(keys, a)
  local ctx = begin(keys)
  local key = ctx.p .. 'worker:' .. a[1]
  redis.call('HSET', key, 'beat', a[2])
  redis.call('EXPIRE', key, 60)
  redis.call('ZADD', keys[1], ctx.now + LEASE_MS, a[1])
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', ctx.now - 60000)
  return {'OK'}
end

local function workers(keys)
  local ctx, beats = begin(keys), {}
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', keys[1], ctx.now, '+inf')) do
    local beat = redis.call('HGET', ctx.p .. 'worker:' .. incarnation, 'beat')
    if beat then beats[#beats + 1] = beat end
  end
  return beats
end

local function retire(keys, a)
  redis.call('ZREM', keys[1], a[1])
  redis.call('UNLINK', begin(keys).p .. 'worker:' .. a[1])
  return {'OK'}
end

redis.register_function{function_name = 'celeriac1_heartbeat', callback = heartbeat, flags = {'allow-oom'}}
redis.register_function{function_name = 'celeriac1_workers', callback = workers, flags = {'no-writes'}}
redis.register_function{function_name = 'celeriac1_retire', callback = retire, flags = {'allow-oom'}}
