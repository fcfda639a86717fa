#!/usr/bin/env bash
# One worker of a job: trains, and tells by its exit code whether it wants to be started again.
#
#   tpu/worker.sh [--restarts=N] [--pause=SECONDS] [--dry_run] FLAGS OF experiments.train
#
# Exit codes: 0 the run is finished (`done` stands in the workdir); 75 it is not, and the same command
# goes on: pre-empted, another process lost, or killed; any other: it failed, and would fail again.
# --restarts=N starts it again up to N times on 75, but not after a SIGTERM or Ctrl-C of its own. PYTHON names
# the interpreter; by default that of .venv, where there is one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

restarts=0 pause=5 dry_run=false flags=()
while (( $# )); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --dry_run) dry_run=true ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"
workdir=
for (( i = 1; i <= $#; i++ )); do
  case ${!i} in
    --workdir=*) workdir=${!i#*=} ;;
    --workdir) next=$((i + 1)); workdir=${!next-} ;;
  esac
done
if [[ -z $workdir || ! $restarts =~ ^[0-9]+$ ]]; then
  echo "worker.sh: got --workdir='$workdir' --restarts='$restarts', allowed: a folder, a whole number" >&2
  exit 2
fi
if [[ -z ${PYTHON-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
command=("$PYTHON" -m experiments.train "$@")
if $dry_run; then
  # In one piece: other workers print beside this one.
  printf -v line '%q ' "${command[@]}"
  echo "$line"
  exit 0
fi

child='' stopping=false interrupted=false
stop() {
  stopping=true interrupted=true
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT
await() {
  wait "$1"
  code=$?
  # A signal ends `wait`, not the child.
  while $interrupted; do
    interrupted=false
    wait "$1"
    code=$?
  done
}

for (( start = 0; ; start++ )); do
  "${command[@]}" &
  child=$!
  # A signal that came before there was a child.
  $stopping && kill -TERM "$child"
  await "$child"
  if (( code == 0 )) && [[ ! -e $workdir/done ]] || (( code > 128 )); then
    code=75
  fi
  if (( code != 75 || start >= restarts )) || $stopping; then
    (( code == 75 )) && echo "worker.sh: $workdir is not finished, the same command goes on; exit 75" >&2
    exit "$code"
  fi
  echo "worker.sh: starts again in $pause s ($((start + 1)) of $restarts)" >&2
  sleep "$pause" &
  child=$!
  await "$child"
  $stopping && exit 75
done
