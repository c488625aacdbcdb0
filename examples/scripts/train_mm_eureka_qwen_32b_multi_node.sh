#!/usr/bin/env bash
# MM-EUREKA 32B on six nodes of 8 GPUs, as a Slurm job: the first stage, or with STAGE=2 the second, from the first one's weights.
# Further words go to `eureka slurm`, e.g. --time 1-00:00:00 data.train=/data/mmk12/train.jsonl
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=${STAGE:-1}
from=()
[ "$stage" = 1 ] || from=(model.path=runs/mm-eureka-32b-stage1/hf)
exec eureka slurm "examples/mmk12/qwen2_5_vl_32b_stage$stage.yaml" --nodes 6 --gpus-per-node 8 "${from[@]}" "$@"
