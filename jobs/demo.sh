#!/usr/bin/env bash
# Runs the main job as on a cluster: starts a local Ray head (unless one answers), submits the job, and stops the head that
# it started. Token authentication stays on: RAY_AUTH_MODE makes head and client use the token of ~/.ray/auth_token.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/${BIN:-.venv/bin}:$PATH"
export RAY_AUTH_MODE=token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # the head stops at once, since no work is left when the job is over
export RAY_num_workers_soft_limit=$(($(nproc) + 2)) # a stage and its tasks keep their processes between steps
export OMP_WAIT_POLICY=passive # waiting threads sleep and leave the cores to other work
export PYTHONUNBUFFERED=1 # lines appear as they are printed, also when the output is a file
# a company's proxy does not lead to this machine
direct=${no_proxy:-${NO_PROXY:-}}
export no_proxy="${direct:+$direct,}127.0.0.1,localhost"
export NO_PROXY="$no_proxy"
# the path of a socket may have 107 bytes, and Ray's sockets lie below this directory
temporary=${RAY_TMPDIR:-${TMPDIR:-/tmp}}
[ ${#temporary} -le 39 ] || { echo "error: $temporary is too long for Ray's sockets: set RAY_TMPDIR=/tmp" >&2; exit 2; }
store=${STORE:-$PWD/store}
address=${RAY_ADDRESS:-http://127.0.0.1:8265}

# the port is asked first: asking Ray costs seconds of imports
listens() { (: </dev/tcp/127.0.0.1/8265) 2>/dev/null; }
answers() { { [ "$address" != http://127.0.0.1:8265 ] || listens; } && ray job list --address "$address" >/dev/null 2>&1; }
# a new head lists jobs some seconds before it takes any
takes_jobs() { listens && ray job submit --address "$address" -- true >/dev/null 2>&1; }

if ! answers; then
  # with authentication, a head starts only if there is a token
  [ -s ~/.ray/auth_token ] || [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || ray get-auth-token --generate >/dev/null
  cpus=$(nproc)
  log=$(mktemp)
  echo "starting a local Ray (its log: $log)"
  ray start --head --block --num-cpus "$((cpus > 2 ? cpus : 2))" --disable-usage-stats \
    --dashboard-agent-listen-port 0 >"$log" 2>&1 & # 0: any free port, another Ray may hold the usual one
  head=$!
  trap 'kill $head 2>/dev/null; wait $head 2>/dev/null || true' EXIT
  SECONDS=0
  until takes_jobs; do
    kill -0 $head 2>/dev/null && [ $SECONDS -lt 120 ] ||
      { cat "$log"; echo "error: Ray takes no jobs at $address; see above and /tmp/ray/session_latest/logs"; exit 1; }
    sleep 0.5
  done
fi
ray job submit --address "$address" --working-dir . -- python jobs/cascade.py --execution.store "$store" "$@"
