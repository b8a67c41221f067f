#!/usr/bin/env bash
# Runs a script as N processes of one job on this machine, as if each were a host of a pod:
#   bash scripts/launch_local.sh 2 scripts/train.py configs/quickstart.py --mesh.fsdp 2
# DEVICES=4 gives each process so many virtual CPU devices. The job ends when the first of them fails; started again it
# goes on from its last checkpoint. --dry-run prints what would be run.
set -euo pipefail
dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
processes=${1:-}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "error: say how many processes, and what each runs: bash scripts/launch_local.sh 2 scripts/train.py CONFIG" >&2
  exit 2
fi
shift

python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
flags=${XLA_FLAGS:-}
[ -z "${DEVICES:-}" ] || flags="$flags --xla_force_host_platform_device_count=$DEVICES"
job=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "XLA_FLAGS=$flags")

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((index = 0; index < processes; index++)); do
  if [ -n "$dry_run" ]; then
    printf '%q ' env "${job[@]}" "JAX_PROCESS_ID=$index" "$python" "$@"
    echo
  else
    env "${job[@]}" "JAX_PROCESS_ID=$index" "$python" "$@" &
    pids+=($!)
  fi
done

status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # A signal to this script, which is passed on above, ends the wait and not the process.
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  [ "$status" -ne 0 ] || status=$code
done
exit "$status"
