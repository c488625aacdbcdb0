"""A colocated run on one GPU: sleep mode, CUDA IPC, the optimizer's state to host memory and back, as they are.

Not yet run on hardware: whoever first does puts the measured figures beside the bars.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import load_config
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.run.turns import Turns
from eureka_megatron.tracking.tracker import read_metrics

pytestmark = pytest.mark.gpu

CONFIG = """
model: {path: model, dtype: bfloat16, freeze: [vision]}
placement: colocated
data: {train: data/train.jsonl, min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 96}
rollout: {samples_per_prompt: 4, max_response_tokens: 16, max_model_tokens: 160, gpu_memory_utilization: 0.5}
algorithm: {loss_options: {entropy_coefficient: 0.1}, filter: {enabled: false}}
optimizer: {lr: 1.0e-3, schedule: constant, warmup_ratio: 0}
training: {steps: 3, prompts_per_step: 4, responses_per_update: 8, max_tokens_per_micro_batch: 4096}
checkpoint: {every: 1}
sync: {check_every: 1}
tracking: {wandb: disabled, tensorboard: false}
"""


def test_a_run_on_one_gpu_whose_engine_frees_its_memory_while_the_trainer_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eureka_megatron.loop import train

    if torch.cuda.device_count() < 1:
        pytest.skip("needs a GPU")
    write_counting(tmp_path / "data", train=24, test=4, noise=0.3)
    build_published(tmp_path / "model", randomize_all=True)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    used: dict[str, list[float]] = {"train": [], "sample": []}

    def noted(turn: str) -> None:
        whole = getattr(Turns, turn)

        def call(self: Any) -> None:
            whole(self)
            free, total = torch.cuda.mem_get_info()
            used[turn].append(1 - free / total)

        monkeypatch.setattr(Turns, turn, call)

    noted("train")
    noted("sample")
    # Every sync compares the checksum of every tensor on both sides, so what came by CUDA IPC is what was sent.
    train(load_config("run.yaml", ["run.output=out"]))
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["train/grad_norm"] > 0 for row in rows] == [True] * 3
    print(f"GPU memory used while sampling {max(used['sample']):.2f}, while training {max(used['train']):.2f}")
    assert min(used["sample"]) > 0.45  # rollout.gpu_memory_utilization, nearly all of it KV cache
    assert max(used["train"]) < 0.2  # contexts of the processes and what vLLM keeps
    print(f"largest difference of log-probabilities {max(row['train/logprob_abs_diff_max'] for row in rows):.1e}")
