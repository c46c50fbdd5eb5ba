-- Registrations for wrk, with one thread: wrk -t 1 -s load.lua URL -- RUN new|mix|random
-- new: every token is new, and follows the one before; random: new, of 32 hexadecimal digits;
-- mix: half of them are new, half were registered before. RUN keeps two loads apart.

local run, load
local recent = 128 -- tokens that may not be answered yet: as many as there are connections
local BODY = [[{"visitor":{"token":"%s","name":"Visitor %s","email":"%s@example.com",]]
  .. [["phone":"+%s","customFields":[{"key":"address","value":"1 Main Street",]]
  .. [["overwrite":true}]}}]]
fresh = 0 -- new tokens; `done` reads it

function setup(thread)
  the_thread = thread
end

function init(arguments)
  run, load = arguments[1], arguments[2]
  local seed = 0
  for index = 1, #run do
    seed = (seed * 31 + run:byte(index)) % 2147483647
  end
  math.randomseed(seed)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

local function token()
  if load == "mix" and fresh > recent and math.random() < 0.5 then
    return run .. "-" .. math.random(fresh - recent)
  end
  fresh = fresh + 1
  if load == "random" then
    local digits = {}
    for index = 1, 4 do
      digits[index] = string.format("%08x", math.random(0, 4294967295))
    end
    return table.concat(digits)
  end
  return run .. "-" .. fresh
end

function request()
  local value = token()
  return wrk.format(nil, nil, nil, string.format(BODY, value, value, value, value))
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"answers": %d, "rate": %.1f, "p50": %.3f, "p99": %.3f, "fresh": %d,'
      .. ' "errors": %d}\n',
    summary.requests,
    summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1000,
    latency:percentile(99) / 1000,
    the_thread:get("fresh"),
    errors.status + errors.connect + errors.read + errors.write + errors.timeout
  ))
end
