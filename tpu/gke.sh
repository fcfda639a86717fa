#!/usr/bin/env bash
# A TPU slice on Google Kubernetes Engine, as a JobSet; kubectl must be set up, JobSet installed.
#
#   tpu/gke.sh run  --name=NAME --image=IMAGE --claim=CLAIM [--accelerator=tpu-v5-lite-podslice]
#                   [--topology=4x4] [--chips=4] [--restarts=20] FLAGS OF experiments.train
#   tpu/gke.sh logs --name=NAME
#   tpu/gke.sh stop --name=NAME        all workers save a checkpoint and leave
#
# --dry_run prints what it would run. --image: see tpu/Dockerfile. --claim: a PersistentVolumeClaim that
# all workers mount (ReadWriteMany), at /data; the workdir must lie there. --chips: in a host.
set -euo pipefail

fail() {
  echo "gke.sh: $1" >&2
  exit 2
}
action=${1-}
case $action in
  run | logs | stop) shift ;;
  *) fail "got '$action', allowed: run, logs, stop" ;;
esac
name='' image='' claim='' accelerator=tpu-v5-lite-podslice topology=4x4 chips=4
restarts=20 dry_run=false flags=()
while (( $# )); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=true ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"
[[ -n $name ]] || fail "--name is required"
[[ $action == run || $# == 0 ]] || fail "got '$1', which $action does not take"

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
# A double-quoted YAML string on one line.
text() {
  local escaped=${1//\\/\\\\}
  echo "\"${escaped//\"/\\\"}\""
}
jobset() {
  local hosts=$(( ${topology//x/*} / chips )) flag
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    # Exit codes 1 and 2 would come again; 75, an eviction or a lost node restart the whole set.
    - name: failedForGood
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: worker
              operator: In
              values: [1, 2]
        template:
          spec:
            restartPolicy: Never
            # From SIGTERM on, for the checkpoint.
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
              cloud.google.com/gke-tpu-topology: $(text "$topology")
            containers:
            - name: worker
              image: $(text "$image")
              command:
              - tpu/worker.sh
$(for flag in "$@" --processes=auto; do echo "              - $(text "$flag")"; done)
              resources:
                limits:
                  google.com/tpu: $chips
              volumeMounts:
              - name: data
                mountPath: /data
            volumes:
            - name: data
              persistentVolumeClaim:
                claimName: $(text "$claim")
EOF
}

case $action in
  run)
    [[ -n $image && -n $claim ]] || fail "--image and --claim are required"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ && $chips =~ ^[1-9][0-9]*$ ]] ||
      fail "got --topology='$topology' --chips='$chips', allowed: such as 4x4 and 4"
    (( (${topology//x/*}) % chips == 0 )) ||
      fail "--topology=$topology does not divide over hosts of $chips chips"
    if $dry_run; then
      echo "# kubectl apply -f -"
      jobset "$@"
    else
      jobset "$@" | kubectl apply -f -
    fi
    ;;
  logs) run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --prefix --follow --tail=100 ;;
  stop) run kubectl delete jobset "$name" ;;
esac
