#!/usr/bin/env bash
# Trains in several processes on this machine's CPU, each as tpu/worker.sh starts it on a pod.
#
#   tpu/local.sh [--processes=2] [--devices=1] [--restarts=N] [--pause=SECONDS] [--dry_run]
#                FLAGS OF experiments.train
#
# --devices is per process. SIGTERM and Ctrl-C make all save a checkpoint and leave. Exit code: the
# worst of the workers'; 75 where the same command goes on.
set -uo pipefail
here=$(dirname "$0")

processes=2 devices=1 options=() flags=()
while (( $# )); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --restarts=* | --pause=* | --dry_run) options+=("$1") ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"
if [[ ! $processes =~ ^[1-9][0-9]*$ || ! $devices =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: got --processes='$processes' --devices='$devices', allowed: whole numbers from 1" >&2
  exit 2
fi
# Free now, and hardly anyone asks for it in the next second.
port=$(python3 -c \
  'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
workers=() interrupted=false
trap 'interrupted=true; kill -TERM "${workers[@]}" 2>/dev/null' TERM INT
for (( i = 0; i < processes; i++ )); do
  place=()
  (( processes > 1 )) && place=(--processes="$processes" --process="$i" --coordinator="localhost:$port")
  "$here/worker.sh" "${options[@]}" "$@" "${place[@]}" &
  workers+=($!)
done

worst=0
for worker in "${workers[@]}"; do
  wait "$worker"
  code=$?
  while $interrupted; do
    interrupted=false
    wait "$worker"
    code=$?
  done
  # What would fail again outweighs what goes on.
  if (( code && (worst == 0 || worst == 75) )); then
    worst=$code
  fi
done
exit "$worst"
