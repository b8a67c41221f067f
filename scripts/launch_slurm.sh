#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster, one process a GPU; a job that is preempted is queued again and goes on.
#   bash scripts/launch_slurm.sh my-run h100:8x8 configs/quickstart.py /shared/my-run --mesh.fsdp 64
# The folder is on a file system that all nodes share, as is this checkout with its .venv. SBATCH holds further options of
# sbatch, as in SBATCH='--partition=gpu --time=24:00:00'. --dry-run prints the job.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/launching.sh
usage="NAME h100:8x8 CONFIG FOLDER"
read_arguments "$@"
[[ $shape =~ ^([0-9]+)x([0-9]+)$ && $slices = 1 ]] || fail "'$topology' must be nodes x GPUs a node, as in h100:8x8."
nodes=${BASH_REMATCH[1]} gpus=${BASH_REMATCH[2]}
agree_to_cost

read -ra options <<<"${SBATCH:-}"
job="#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --output=$name-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@60
cd $(printf '%q' "$PWD")
. .venv/bin/activate
status=0
srun --kill-on-bad-exit=1 $(printf '%q ' "${train[@]}") || status=\$?
# 143 says that the training was asked to end and has saved.
[ \"\$status\" -ne 143 ] || scontrol requeue \"\$SLURM_JOB_ID\"
exit \"\$status\""
if [ -n "$dry_run" ]; then
  printf '%q ' sbatch "${options[@]}"
  printf "<<'JOB'\n%s\nJOB\n" "$job"
else
  sbatch "${options[@]}" <<<"$job"
fi
