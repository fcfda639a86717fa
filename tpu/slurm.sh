#!/usr/bin/env bash
# A GPU cluster under Slurm: one process for each GPU.
#
#   tpu/slurm.sh [--nodes=1] [--gpus=8] [--sbatch='--partition=P --time=1-00:00'] [--restarts=20]
#                [--dry_run] FLAGS OF experiments.train
#
# Outside of a job it submits itself; in the job it runs tpu/worker.sh on every node, and puts the job
# back into the queue where that ends with 75. --gpus is per node; --sbatch takes any options of sbatch.
# squeue, scancel --signal=TERM JOB (saves, and the job comes back) and scancel JOB do the rest.
set -uo pipefail

nodes=1 gpus=8 sbatch=() restarts=20 dry_run=false flags=()
while (( $# )); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --sbatch=*) read -ra sbatch <<<"${1#*=}" ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=true ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"

# Every task of a node must see all of the node's GPUs: JAX itself gives each its own. SIGTERM comes two
# minutes before the time limit, to the workers.
submit=(sbatch --job-name=nestnet --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
  --signal=TERM@120 --requeue --open-mode=append --output=nestnet-%j.log "${sbatch[@]}"
  tpu/slurm.sh --restarts="$restarts" "$@")
# The others end by themselves when one is lost, and srun gives the largest of the exit codes.
train=(srun --kill-on-bad-exit=0 --wait=0 tpu/worker.sh "$@" --processes=auto)

if $dry_run; then
  printf '%q ' "${submit[@]}"
  printf '\n# in the job:\n'
  printf '%q ' "${train[@]}"
  echo
elif [[ -z ${SLURM_JOB_ID-} ]]; then
  # The job begins in the folder that it was submitted from.
  cd "$(dirname "$0")/.." || exit 2
  exec "${submit[@]}"
else
  "${train[@]}"
  code=$?
  if (( (code == 75 || code > 128) && ${SLURM_RESTART_COUNT:-0} < restarts )); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi
