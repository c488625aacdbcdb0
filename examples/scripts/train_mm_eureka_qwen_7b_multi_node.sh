#!/usr/bin/env bash
# MM-EUREKA 7B on three nodes of 8 GPUs, as a Slurm job. Further words go to `eureka slurm`, e.g. --time 1-00:00:00 data.train=/data/mmk12/train.jsonl
set -euo pipefail
cd "$(dirname "$0")/../.."
exec eureka slurm examples/mmk12/qwen2_5_vl_7b_multi_node.yaml --nodes 3 --gpus-per-node 8 "$@"
