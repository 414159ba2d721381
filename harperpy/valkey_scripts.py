"""What is done at once on a Valkey server, in Lua: one step that nobody comes between.

A meter has two keys. `stands` is a hash: a rate's `used` and `at`; of places and budgets what is
`held` in all, and for each ledger what it has `spent:` and how often that changed (`version:`).
`holds` is a hash of those who hold: from `ledger/call` to `amount life`. A life is one run of one
process; as long as it lasts, it has a key. While a process of a ledger reads what that has spent,
there is a third key: `ended` has what the calls were that end meanwhile, and since when.
"""

from __future__ import annotations

import hashlib


class Script:
    """A step in Lua, known to the server by its hash."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_WORDS = """
local function number(text) return tonumber(text or 0) or 0 end
local function exact(value) return string.format('%.17g', value) end
local function flowed(stands, limit, now)
    local row = redis.call('HMGET', stands, 'used', 'at')
    local seen = math.max(now, number(row[2]))
    return math.max(0, number(row[1]) - (seen - number(row[2])) * limit / 60), seen
end
local function keep_rate(stands, limit, used, seen)
    redis.call('HSET', stands, 'used', exact(used), 'at', exact(seen))
    redis.call('EXPIRE', stands, math.ceil(used / limit * 60) + 1)
end
local function ended_of(holds, ledger)
    return 'harperpy:ended:' .. ledger .. string.sub(holds, #'harperpy:holds:')
end
local function let_go(stands, holds, field)
    local value = redis.call('HGET', holds, field)
    if not value then return false end
    redis.call('HDEL', holds, field)
    local amount = string.match(value, '^%d+')
    -- What costs nothing holds nothing, and '-0' is no number there.
    if amount == '0' then return true end
    local left = redis.call('HINCRBY', stands, 'held', '-' .. amount)
    if left < 0 then redis.call('HSET', stands, 'held', 0) end
    return true
end
"""

TAKE = Script(
    _WORDS
    + """
-- KEYS: stands, holds of each meter; ARGV: now, deadline, ledger, call, life, lease, and of each
-- meter its kind, limit, what to take, and how long to keep it.
local now, ledger, call, life = tonumber(ARGV[1]), ARGV[3], ARGV[4], ARGV[5]
local time = redis.call('TIME')
-- Who asked has stopped waiting: what is taken now nobody would give back.
if time[1] + time[2] / 1e6 > tonumber(ARGV[2]) then return {'late'} end
redis.call('SET', 'harperpy:life:' .. life, 1, 'EX', ARGV[6])

local function spent(stands)
    local sum, known, row = 0, false, redis.call('HGETALL', stands)
    for i = 1, #row, 2 do
        if string.sub(row[i], 1, 6) == 'spent:' then
            sum, known = sum + row[i + 1], known or row[i] == 'spent:' .. ledger
        end
    end
    return sum, known
end
local function sweep(stands, holds)
    local row = redis.call('HGETALL', holds)
    for i = 1, #row, 2 do
        local other = string.match(row[i + 1], ' (.*)$')
        if redis.call('EXISTS', 'harperpy:life:' .. other) == 0 then
            let_go(stands, holds, row[i])
        end
    end
end

local fits, known, meters, answer = true, true, {}, {}
for i = 1, #KEYS / 2 do
    local meter = {stands = KEYS[2 * i - 1], holds = KEYS[2 * i], kind = ARGV[4 * i + 3],
        limit = tonumber(ARGV[4 * i + 4]), amount = tonumber(ARGV[4 * i + 5]),
        given = ARGV[4 * i + 5], keep = ARGV[4 * i + 6], used = 0, held = 0}
    if meter.kind == 'rate' then
        meter.used, meter.seen = flowed(meter.stands, meter.limit, now)
    else
        meter.held = number(redis.call('HGET', meter.stands, 'held'))
        if meter.kind == 'budget' then
            local mine
            meter.used, mine = spent(meter.stands)
            known = known and mine
        elseif meter.held + meter.amount > meter.limit then
            sweep(meter.stands, meter.holds)
            meter.held = number(redis.call('HGET', meter.stands, 'held'))
        end
    end
    local over = meter.used + meter.held + meter.amount - meter.limit
    if over > 1e-6 and (meter.kind ~= 'budget' or meter.amount > 0) then fits = false end
    meters[i] = meter
    answer[2 * i] = exact(meter.used)
    answer[2 * i + 1] = exact(meter.held)
end
answer[1] = not known and 'unknown' or fits and 'taken' or 'refused'
if answer[1] == 'taken' then
    for _, meter in ipairs(meters) do
        if meter.kind == 'rate' then
            keep_rate(meter.stands, meter.limit, meter.used + meter.amount, meter.seen)
        else
            redis.call('HSET', meter.holds, ledger .. '/' .. call, meter.given .. ' ' .. life)
            redis.call('HINCRBY', meter.stands, 'held', meter.given)
            redis.call('EXPIRE', meter.stands, meter.keep)
            redis.call('EXPIRE', meter.holds, meter.keep)
        end
    end
end
return answer
"""
)

SETTLE = Script(
    _WORDS
    + """
-- KEYS: stands, holds of each meter; ARGV: now, ledger, call, and of each meter its kind, limit,
-- what was taken, and what it was in the end. Answers which of them held nothing any more.
local now, ledger, call, lost = tonumber(ARGV[1]), ARGV[2], ARGV[3], {}
for i = 1, #KEYS / 2 do
    local stands, kind, limit = KEYS[2 * i - 1], ARGV[4 * i], tonumber(ARGV[4 * i + 1])
    local taken, actual = ARGV[4 * i + 2], ARGV[4 * i + 3]
    if kind == 'rate' then
        local used, seen = flowed(stands, limit, now)
        keep_rate(stands, limit, math.max(0, used + actual - taken), seen)
    else
        local held = let_go(stands, KEYS[2 * i], ledger .. '/' .. call)
        if not held then lost[#lost + 1] = i end
        if kind == 'budget' and held then
            local ended = ended_of(KEYS[2 * i], ledger)
            redis.call('HINCRBY', stands, 'spent:' .. ledger, actual)
            if redis.call('EXISTS', ended) == 1 then redis.call('HSET', ended, call, actual) end
        elseif kind == 'budget' then
            redis.call('HINCRBY', stands, 'version:' .. ledger, 1)
        end
    end
end
return lost
"""
)

LOOK = Script(
    _WORDS
    + """
-- KEYS: stands, holds, lives; ARGV: ledger, and how long to note what ends from now on. The version
-- of what the ledger has spent, since when it is noted, and its calls that hold, each with 1 if a
-- process lives that may end it, and those that are noted already.
local lives, ended, time = {}, ended_of(KEYS[2], ARGV[1]), redis.call('TIME')
for _, life in ipairs(redis.call('HVALS', KEYS[3])) do lives[life] = true end
redis.call('HSETNX', ended, 'since', time[1] .. '.' .. time[2])
redis.call('EXPIRE', ended, ARGV[2])
local version = redis.call('HGET', KEYS[1], 'version:' .. ARGV[1]) or '0'
local answer = {version, redis.call('HGET', ended, 'since')}
local row = redis.call('HGETALL', KEYS[2])
for i = 1, #row, 2 do
    local ledger, call = string.match(row[i], '^(.*)/(%d+)$')
    if ledger == ARGV[1] then
        answer[#answer + 1] = call
        answer[#answer + 1] = lives[string.match(row[i + 1], ' (.*)$')] and 1 or 0
    end
end
for _, call in ipairs(redis.call('HKEYS', ended)) do
    if call ~= 'since' then
        answer[#answer + 1] = call
        answer[#answer + 1] = 1
    end
end
return answer
"""
)

PUBLISH = Script(
    _WORDS
    + """
-- KEYS: stands, holds; ARGV: ledger, the version that was seen, since when it was noted what ended,
-- of how many such calls is known whether they are in the number, what the ledger has spent, how
-- long to keep it, and the calls that hold and are in that number. Answers 'told'; or 'old' where
-- others came between; or 'ended' and all that is noted, if that is another number of calls.
local ledger, ended = ARGV[1], ended_of(KEYS[2], ARGV[1])
local version = redis.call('HGET', KEYS[1], 'version:' .. ledger) or '0'
if version ~= ARGV[2] or redis.call('HGET', ended, 'since') ~= ARGV[3] then return {'old'} end
if redis.call('HLEN', ended) - 1 ~= tonumber(ARGV[4]) then
    local answer = redis.call('HGETALL', ended)
    table.insert(answer, 1, 'ended')
    return answer
end
for i = 7, #ARGV do let_go(KEYS[1], KEYS[2], ledger .. '/' .. ARGV[i]) end
redis.call('DEL', ended)
redis.call('HSET', KEYS[1], 'spent:' .. ledger, ARGV[5])
redis.call('HINCRBY', KEYS[1], 'version:' .. ledger, 1)
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return {'told'}
"""
)

BEAT = Script(
    """
-- KEYS: lives; ARGV: worker, of, life, lease, how long to keep them. The time, which life the
-- worker had, and which run of the server this is, where it tells such as us.
redis.call('SET', 'harperpy:life:' .. ARGV[3], 1, 'EX', ARGV[4])
local before = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
local row = redis.call('HGETALL', KEYS[1])
for i = 1, #row, 2 do
    if tonumber(row[i]) >= tonumber(ARGV[2]) then
        redis.call('HDEL', KEYS[1], row[i])
        redis.call('DEL', 'harperpy:life:' .. row[i + 1])
    end
end
if before and before ~= ARGV[3] then redis.call('DEL', 'harperpy:life:' .. before) end
local time = redis.call('TIME')
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x+)')
return {time[1], time[2], before or '', run or ''}
"""
)
