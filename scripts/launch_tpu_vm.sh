#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it as a queued resource, copies this checkout to all its workers, runs the same
# command on each over ssh, asks anew after a preemption, and gives the slice back whatever happens.
#   ZONE=us-west4-a bash scripts/launch_tpu_vm.sh my-run v5e:4x4 configs/quickstart.py gs://BUCKET/my-run --mesh.fsdp 16
# gcloud's own settings name the project. SPOT=1 takes spot capacity; RUNTIME names another image.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/launching.sh
usage="NAME v5e:4x4 CONFIG gs://BUCKET/FOLDER"
read_arguments "$@"
case $chip in
  v4 | v5p) type=$chip-$((chips * 2)) image=tpu-ubuntu2204-base ;; # these are named by their cores
  v5e) type=v5litepod-$chips image=v2-alpha-tpuv5-lite ;;
  v6e) type=v6e-$chips image=v2-alpha-tpuv6e ;;
  *) fail "a TPU VM has v4, v5e, v5p or v6e chips, not $chip; use scripts/launch_gke.sh or scripts/launch_slurm.sh." ;;
esac
[ "$chip" != v5p ] || image=v2-alpha-tpuv5
[ "$slices" = 1 ] || fail "several slices are for scripts/launch_gke.sh; give one, as in $chip:$shape."
[ -n "${ZONE:-}" ] || fail "set ZONE to where the chips are, as in ZONE=us-west4-a."
from_bucket ../bucket
agree_to_cost

queue=(gcloud compute tpus queued-resources)
place=(--zone "$ZONE")
ask=(--accelerator-type "$type" --runtime-version "${RUNTIME:-$image}" ${SPOT:+--spot})
state() { "${queue[@]}" describe "$name" "${place[@]}" --format 'value(state.state)'; }
give_back() { run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet; }
on_all() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker all --command "$1"; }

archive=$(mktemp -u).tar.gz
run git archive --format tar.gz --output "$archive" HEAD
trap 'rm -f "$archive"; give_back' EXIT
while true; do
  run "${queue[@]}" create "$name" --node-id "$name" "${place[@]}" "${ask[@]}"
  until [ -n "$dry_run" ] || [ "$(state)" = ACTIVE ]; do
    [ "$(state)" != FAILED ] || fail "the request for $type in $ZONE failed; ask for it in another zone."
    sleep "${POLL_SECONDS:-30}"
  done
  run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxcost.tar.gz" "${place[@]}" --worker all
  on_all "mkdir -p jaxcost && tar -xzf jaxcost.tar.gz -C jaxcost && python3 -m venv venv && venv/bin/pip install -q -e 'jaxcost[tpu]'"
  on_all "mkdir -p bucket && gcsfuse --implicit-dirs $bucket bucket"
  status=0
  on_all "cd jaxcost && . ../venv/bin/activate && $(printf '%q ' "${train[@]}")" || status=$?
  # A slice that is still there was not taken away: the training itself ended.
  [ -z "$dry_run" ] && [ "$status" -ne 0 ] && [ "$(state)" != ACTIVE ] || break
  echo "The slice was preempted; asking for another, on which the training goes on." >&2
  give_back
done
exit "$status"
