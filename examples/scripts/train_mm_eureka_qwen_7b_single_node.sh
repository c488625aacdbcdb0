#!/usr/bin/env bash
# MM-EUREKA 7B on the 8 GPUs of this node. Further words go to `eureka train`, e.g. data.train=/data/mmk12/train.jsonl --resume auto
set -euo pipefail
cd "$(dirname "$0")/../.."
exec eureka train examples/mmk12/qwen2_5_vl_7b_single_node.yaml "$@"
