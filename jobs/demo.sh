#!/usr/bin/env bash
# The main job as a cluster would run it: a local Ray head (unless one answers), `ray job submit`, then what was started is stopped.
# Token authentication stays on: Ray writes the token for us and the submitting client reads it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/${BIN:-.venv/bin}:$PATH"
export RAY_AUTH_MODE=token
export OMP_WAIT_POLICY=passive # waiting threads sleep: twice as fast on a machine that does other work too
store=${STORE:-$PWD/store}
address=${RAY_ADDRESS:-http://127.0.0.1:8265}

if ! ray job list --address "$address" >/dev/null 2>&1; then
  cpus=$(( $(nproc) > 2 ? $(nproc) : 2 ))
  echo "starting a local Ray with $cpus CPUs"
  ray start --head --num-cpus "$cpus" --disable-usage-stats >/tmp/sparsekd-ray-start.log 2>&1 ||
    { cat /tmp/sparsekd-ray-start.log; exit 1; }
  trap 'ray stop >/dev/null 2>&1 || true' EXIT
fi
ray job submit --address "$address" --working-dir . -- python jobs/cascade.py --execution.store "$store" "$@"
