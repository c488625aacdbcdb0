"""A vocabulary, a picture and responses of real size through one step: what a tiny vocabulary would hide in memory, positions and numbers."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from eureka_megatron.config import make_config
from eureka_megatron.data.processor import make_processor
from eureka_megatron.demo.forms import build_published
from eureka_megatron.demo.story import PeakMemory
from eureka_megatron.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.system]

TOKENS, ROWS = 151936, 152064  # of the tokenizer, and of the 7B model's embedding
RESPONSE, UNITS = 1000, 640
MEMORY_GIB = 7.0  # of all processes but for what this one held before; measured 5.7, and logits held at once would add 2.3 in the forward pass and more in the backward
BAR = 1e-5  # nats between trainer and engine, fp32; measured at most 1.9e-6


def write_rows(folder: Path) -> Path:
    """A question about a noisy picture of 20 × 32 merge units, 560 × 896 pixels: nothing is resized away."""
    pixels = np.random.default_rng(0).integers(0, 256, (560, 896, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    content = [{"type": "image", "image": "noise.png"}, {"type": "text", "text": "What is shown?"}]
    row = {"id": "0", "message": [{"role": "user", "content": content}], "answer": "7"}
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_one_step_at_the_size_of_the_real_thing(one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = build_published(tmp_path / "model", vocab_size=TOKENS, spare_rows=ROWS - TOKENS, randomize_all=True)
    config = make_config(
        {
            "run": {"output": str(tmp_path / "run")},
            "model": {"path": str(model), "dtype": "float32", "freeze": ["vision"]},
            "parallel": {"tensor": 2, "sequence_parallel": True},
            "data": {"train": str(write_rows(tmp_path)), "max_prompt_tokens": 700, "min_pixels": 3136},
            "rollout": {"samples_per_prompt": 4, "max_response_tokens": RESPONSE, "max_model_tokens": 1700},
            "rewards": {"function": "tests.helpers.rewards:by_characters"},
            "algorithm": {"filter": {"enabled": False}},
            "training": {
                "steps": 1,
                "prompts_per_step": 1,
                "responses_per_update": 4,
                "max_tokens_per_micro_batch": 8192,
            },
            "sync": {"check_every": 1},
            "checkpoint": {"every": 0},
            "tracking": {"wandb": "disabled", "tensorboard": False, "console": False},
        }
    )
    processor = make_processor(config)
    assert len(processor.tokenizer) == TOKENS
    prompt = processor.prompt(
        [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "noise.png")}]}], folders=[tmp_path]
    )
    assert prompt.pictures[0].units == UNITS
    assert (
        prompt.positions_3S.max() < len(prompt.tokens_S) - UNITS + 32 + 1
    )  # a picture takes its longer side of positions, not its units
    before = psutil.Process().memory_full_info().pss
    with PeakMemory() as memory:
        train(config)
    peak_gib = (memory.peak_bytes - before) / 2**30
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    logits_bytes = 4 * RESPONSE * ROWS * 4
    with capsys.disabled():
        print(
            f"\n{RESPONSE} tokens of {ROWS} words, a picture of {UNITS} units: trainer against engine "
            f"{metrics['train/logprob_abs_diff_max']:.1e}, all processes together {peak_gib:.2f} GiB "
            f"(the batch's logits alone would be {logits_bytes / 2**30:.2f} GiB in fp32), "
            f"rollout {metrics['time/rollout']:.1f} s, train {metrics['time/train']:.1f} s"
        )
    assert metrics["train/response_length"] > RESPONSE / 2  # random models rarely end a turn
    assert metrics["train/logprob_abs_diff_max"] < BAR
    assert peak_gib < MEMORY_GIB
