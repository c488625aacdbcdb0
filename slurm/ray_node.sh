#!/usr/bin/env bash
# Ray on one node of a job, until its step is ended: started once a node by train.sbatch. Arguments: HOST:PORT of the head, folder for logs.
#
# Everything temporary lies in a folder that bears the job's number, and no port is one of Ray's fixed ones: jobs on one node do not meet.
set -euo pipefail
head="$1" logs="$2"
folder="$EUREKA_SCRATCH/eureka-$SLURM_JOB_ID"
rm -rf "$folder" # of an attempt that this node did not survive
mkdir -p "$folder"
export TMPDIR="$folder" RAY_worker_niceness=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_USAGE_STATS_ENABLED=0

address="$(bash "$EUREKA_HOME/slurm/address.sh")"
options=(--temp-dir="$folder" --num-cpus="$SLURM_CPUS_ON_NODE" --min-worker-port=0 --max-worker-port=0
  --dashboard-agent-listen-port=0 --disable-usage-stats --block)
options+=(${address:+--node-ip-address="$address"} ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"}
  ${EUREKA_OBJECT_STORE_BYTES:+--object-store-memory="$EUREKA_OBJECT_STORE_BYTES"})

if [[ "$SLURM_PROCID" == 0 ]]; then
  port="${head##*:}"
  options+=(--head --port="$port" --ray-client-server-port="$((port + 1))" --include-dashboard=false)
else
  options+=(--address="$head")
  end=$((SECONDS + EUREKA_RAY_SECONDS))
  until (exec 3<>"/dev/tcp/${head%:*}/${head##*:}") 2>/dev/null; do
    ((SECONDS < end)) || { echo "error: no Ray at $head within $EUREKA_RAY_SECONDS s" >&2; exit 1; }
    sleep 0.5
  done
fi

ray start "${options[@]}" &
ray=$!
ended=""
trap 'ended=1; kill -TERM "$ray" 2>/dev/null || true' TERM INT USR1
code=0
wait "$ray" || code=$?
if [[ -n "$ended" ]]; then
  wait "$ray" 2>/dev/null || true # the signal has interrupted the first
  code=0 # with another, srun would kill the other nodes' tasks before they have cleaned up
fi
cp -r "$folder/session_latest/logs" "$logs/ray_$SLURMD_NODENAME" 2>/dev/null || true
rm -rf "$folder"
exit "$code"
