# shellcheck shell=bash disable=SC2034  # read by the scripts that source this one
# What differs from site to site. Sourced on the first node of a job; srun hands the environment on to the others.

# 1. Where eureka is installed. Modules and a virtual environment …
# module load cuda/13.0 python/3.12
EUREKA_VENV="${EUREKA_VENV:-$EUREKA_HOME/.venv}"
if [[ -d "$EUREKA_VENV" ]]; then
  PATH="$EUREKA_VENV/bin:$PATH"
fi
# … or a container: enroot with pyxis (options of srun), or Apptainer (what stands before each command)
EUREKA_SRUN=()  # (--container-image=/shared/eureka.sqsh --container-mounts=/shared:/shared)
EUREKA_EXEC=()  # (apptainer exec --nv --bind /shared /shared/eureka.sif)

# 2. A disk of each node's own, with a path of at most 30 characters: Ray's sockets, logs and spilled objects.
export EUREKA_SCRATCH="${EUREKA_SCRATCH:-/tmp}"

# 3. The network between the nodes, where the one that bears their names is not the one to use.
# export EUREKA_INTERFACE=ib0 NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# 4. Seconds that all nodes' Ray may take to come up; Ray's object store (bytes), where its own choice (30 % of the memory) is wrong.
export EUREKA_RAY_SECONDS="${EUREKA_RAY_SECONDS:-300}"
export EUREKA_OBJECT_STORE_BYTES="${EUREKA_OBJECT_STORE_BYTES:-}"

# 5. Attempts, those ended by a time limit included, after which a job that lost a node is no longer queued again.
EUREKA_MAX_RESTARTS="${EUREKA_MAX_RESTARTS:-100}"
