# shellcheck shell=bash
# Shared by the batch scripts, which source it: the site's env.sh, the folder of this attempt's logs, phases with time stamps.
set -euo pipefail
export EUREKA_HOME="${EUREKA_HOME:-$SLURM_SUBMIT_DIR}"
# shellcheck source=slurm/env.sh
source "$EUREKA_HOME/slurm/env.sh"

# Logs of this job and attempt, which nothing overwrites: LOGS/job_12/attempt_0, after a requeue attempt_1.
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
attempt="${SLURM_RESTART_COUNT:-0}"
while [[ -e "${EUREKA_LOGS:-$SLURM_SUBMIT_DIR/slurm-logs}/job_$job/attempt_$attempt" ]]; do attempt=$((attempt + 1)); done
logs="${EUREKA_LOGS:-$SLURM_SUBMIT_DIR/slurm-logs}/job_$job/attempt_$attempt"
mkdir -p "$logs"

phase() {
  printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" | tee -a "$logs/phases.log"
}

# One command on the first node, with all of its share of the job. Its output is the job's.
on_one_node() {
  phase "begin: $*"
  local code=0
  srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 "${EUREKA_SRUN[@]}" "${EUREKA_EXEC[@]}" "$@" \
    > >(tee "$logs/output.log") 2>&1 || code=$?
  phase "end: exit code $code"
  return "$code"
}
