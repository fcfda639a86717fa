#!/usr/bin/env bash
# A TPU pod slice (Cloud TPU VMs), from the machine on which gcloud is logged in.
#
#   tpu/pod.sh create  --name=NAME --zone=ZONE --type=v5litepod-16 [--version=IMAGE] [--spot]
#   tpu/pod.sh status  --name=NAME --zone=ZONE
#   tpu/pod.sh install --name=NAME --zone=ZONE
#   tpu/pod.sh run     --name=NAME --zone=ZONE [--restarts=N] FLAGS OF experiments.train
#   tpu/pod.sh logs    --name=NAME --zone=ZONE [--worker=0]
#   tpu/pod.sh stop    --name=NAME --zone=ZONE      all workers save a checkpoint and leave
#   tpu/pod.sh delete  --name=NAME --zone=ZONE      gives the machines back
#
# --dry_run prints what it would run. `create` asks a queue; `status` tells when it is ACTIVE. `install`
# copies the committed tree to every worker. The workdir must lie on a file system that all workers
# mount (Filestore, NFS). `run` leaves the training behind in the background, with a log on each worker.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "pod.sh: $1" >&2
  exit 2
}
action=${1-}
case $action in
  create | status | install | run | logs | stop | delete) shift ;;
  *) fail "got '$action', allowed: create, status, install, run, logs, stop, delete" ;;
esac
name='' zone='' type='' version='' worker=0 restarts=20 spot=() dry_run=false flags=()
while (( $# )); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry_run=true ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"
[[ -n $name && -n $zone ]] || fail "--name and --zone are required"
[[ $action == run || $# == 0 ]] || fail "got '$1', which $action does not take"

# An image for each kind of TPU: https://cloud.google.com/tpu/docs/runtimes
image() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type: got '$type', allowed: v6e-N, v5p-N, v5litepod-N, v4-N, or any with --version" ;;
  esac
}
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
vm() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$zone"; }
on() { vm ssh "$name" --worker="$1" --command="$2"; }
quoted() { printf '%q ' "$@"; }

case $action in
  create)
    [[ -n $version ]] || version=$(image)
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
    ;;
  status) run gcloud compute tpus queued-resources describe "$name" --zone="$zone" ;;
  install)
    archive=$(mktemp -d)/nestnet.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    run git archive --format=tar.gz --output="$archive" HEAD
    vm scp "$archive" "$name:nestnet.tar.gz" --worker=all
    # The images come with Python 3.10; uv brings one that is new enough. jax[tpu] brings libtpu.
    on all "mkdir -p nestnet && tar -xzf nestnet.tar.gz -C nestnet && cd nestnet && \
python3 -m pip install -q --user uv && python3 -m uv venv -q --python=3.12 --allow-existing .venv && \
python3 -m uv pip install -q --python=.venv/bin/python -r requirements.txt 'jax[tpu]>=0.10.2,<0.12'"
    ;;
  run)
    on all "cd nestnet && (setsid nohup tpu/worker.sh $(quoted --restarts="$restarts" "$@" --processes=auto)\
>>../nestnet.log 2>&1 </dev/null & echo \$! >../nestnet.pid)"
    ;;
  logs) on "$worker" "tail -n 100 -F nestnet.log" ;;
  stop) on all "kill -TERM \$(cat nestnet.pid)" ;;
  delete) run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
esac
