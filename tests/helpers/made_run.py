"""The folder of a run that never ran: the counting task's pictures and questions, with responses and figures made up.

As `eureka train` leaves it, written by the same code, but for the numbers. For tests of the report and the picture in its page.
"""

import json
import random
import shutil
import zlib
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.demo.counting import Example, draw, examples, response
from eureka_megatron.tracking.rollouts import step_file, step_files
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.types import Batch, BeganWith, Group, Picture, Prompt, Rollout, Sample

TOKENS = list("\n !\"'()*+,-./:;<=>?\\_{}|") + [chr(code) for code in (*range(48, 58), *range(65, 91), *range(97, 123))]
END = len(TOKENS)


@dataclass(frozen=True)
class MadeRun:
    """How much of it, and what is peculiar about it."""

    steps: int = 40
    every: int = 10  # rollouts are stored of each so many
    groups: int = 4
    responses: int = 8
    pictures: int = 16  # different questions
    seed: int = 0
    text: str = ""  # said by the first response of every group, in place of the counting


def made_config(run: MadeRun, /, **keys: Any) -> RunConfig:
    return make_config(
        {
            "model": {"path": "tiny"},
            "data": {"train": "train.jsonl"},
            "run": {"name": "counting"},
            "training": {"steps": run.steps},
            "rollout": {"samples_per_prompt": run.responses},
            "optimizer": {"lr": 3e-4},
            "tracking": {
                "wandb": "disabled",
                "tensorboard": False,
                "console": False,
                "rollouts_every": run.every,
                "rollouts_per_step": run.groups,
            },
            **keys,
        }
    )


def make_run(folder: Path, run: MadeRun = MadeRun(), /, **keys: Any) -> Path:
    """Write it. keys: sections of its configuration."""
    source = random.Random(run.seed)
    questions = list(islice(examples(run.seed), run.pictures))
    with Tracker(made_config(run, **keys), folder) as tracker:
        for step in range(run.steps):
            skill = 0.35 + 0.6 * step / max(run.steps - 1, 1)
            groups = [
                made_group(questions[(step * run.groups + place) % len(questions)], skill, run, source)
                for place in range(run.groups)
            ]
            tracker.rollouts(step, groups, batch_of(groups), decode, lambda count, known=groups: trained(known))
            tracker.log(step, _metrics(step, groups, skill, source))
    _pass_time(folder / "metrics.jsonl")
    seats = [{"role": "trainer", "rank": rank, "node": "node-1", "gpus": [rank], "pid": 100 + rank} for rank in (0, 1)]
    seats.append({"role": "engine", "rank": 0, "node": "node-1", "gpus": [2], "pid": 102})
    (folder / "topology.json").write_text(json.dumps({"placement": "split", "seats": seats}))
    return folder


def _pass_time(path: Path) -> None:
    """Lines were logged within a moment; now each ends when its phases have passed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    now = lines[0]["time"]
    for line in lines:
        now += sum(value for name, value in line.items() if name.startswith("time/"))
        line["time"] = now
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def decode(tokens: list[int]) -> str:
    return "".join("<|im_end|>" if token == END else TOKENS[token] for token in tokens)


def batch_of(groups: list[Group]) -> Batch:
    """Advantages as GRPO has them."""
    samples = []
    for group in groups:
        totals = group.rewards("total")
        for rollout, total in zip(group.rollouts, totals, strict=True):
            advantage = (total - totals.mean()) / (totals.std() + 1e-6)
            tokens = np.concatenate([group.prompt.tokens_S, rollout.tokens_R])
            ones = np.ones(len(tokens), dtype=np.float32)
            samples.append(Sample(tokens, group.prompt.positions_3S, ones, ones * np.float32(advantage)))
    return Batch.of(samples)


def trained(groups: list[Group]) -> dict[int, BeganWith]:
    found = {}
    for group in groups:
        for rollout in group.rollouts:
            logprobs = np.concatenate([0 * group.prompt.tokens_S, rollout.logprobs_R * np.float32(1.01)])
            found[len(found)] = BeganWith(logprobs.astype(np.float32), -2 * logprobs.astype(np.float32))
    return found


def picture_of(example: Example) -> Picture:
    units = np.arange(9)
    key = f"{zlib.crc32(repr(example).encode()):08x}"
    nothing = np.zeros((36, 2), dtype=np.int64)
    return Picture(key, draw(example), (1, 6, 6), torch.zeros(36, 0), nothing, units, np.array([36]), np.array([36]))


def made_group(example: Example, skill: float, run: MadeRun, source: random.Random) -> Group:
    question = f"<|vision_start|><|image_pad|><|vision_end|>{example.question}"
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = np.zeros(30, dtype=np.int64)
    prompt = Prompt(
        f"count-{example.level}",
        text,
        str(example.answer),
        tokens,
        np.zeros((3, 30), np.int64),
        (picture_of(example),),
        (4,),
    )
    rollouts = [_rollout(example, skill, source) for _ in range(run.responses)]
    if run.text:
        rollouts[0] = replace(rollouts[0], **_said(run.text, source))
    return Group(prompt, tuple(rollouts))


def _rollout(example: Example, skill: float, source: random.Random) -> Rollout:
    text = response(example, source, 0.0 if source.random() < skill else 1.0)
    right = float(text.endswith(f"{{{example.answer}}}</answer>"))
    shaped = float(source.random() < 0.9)
    if not shaped:
        text = text.replace("</think>", "")
    rewards = {"accuracy": right, "format": shaped, "total": right + 0.5 * shaped}
    return Rollout(**_said(text, source), finish_reason="stop", weight_version=0, rewards=rewards)


def _said(text: str, source: random.Random) -> dict[str, Any]:
    tokens = [TOKENS.index(letter) for letter in text] + [END]
    logprobs = -np.array([source.expovariate(4.0) for _ in tokens], dtype=np.float32)
    return {"text": text, "tokens_R": np.array(tokens), "logprobs_R": logprobs}


def _metrics(step: int, groups: list[Group], skill: float, source: random.Random) -> dict[str, float]:
    accuracies = [float(group.rewards("accuracy").mean()) for group in groups]
    wrong, right = (sum(value == end for value in accuracies) for end in (0.0, 1.0))
    found = {
        "train/reward": float(np.mean([group.rewards("total").mean() for group in groups])),
        "train/accuracy_rewards": float(np.mean(accuracies)),
        "train/response_length": float(np.mean([len(r.tokens_R) for group in groups for r in group.rollouts])),
        "train/logprob_abs_diff_max": 10 ** source.uniform(-3, -2),
        "train/entropy": 1.2 - skill + source.uniform(-0.05, 0.05),
        "train/grad_norm": source.lognormvariate(0, 0.3),
        "train/rewards_differ": 1 - (wrong + right) / len(groups),
        "filter/all_wrong": float(wrong),
        "filter/all_right": float(right),
        "filter/mixed": float(len(groups) - wrong - right),
        "filter/kept": float(len(groups)),
        "filter/skipped": 0.0,
        "time/rollout": source.uniform(3, 5),
        "time/train": source.uniform(2, 3),
        "time/sync": source.uniform(0.2, 0.4),
    }
    if (step + 1) % 10 == 0:
        found |= {"eval/accuracy": round(200 * skill) / 200, "eval/samples": 200.0, "time/evaluate": 1.5}
    return found


def make_long_run(folder: Path, steps: int = 1000) -> Path:
    """So many steps with 64 stored rollouts each: those of one step, over and over."""
    make_run(folder, MadeRun(steps=1, groups=8, responses=8))
    (first,) = step_files(folder).values()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    for step in range(1, steps):
        shutil.copy(first, step_file(folder, step))
    again = [json.dumps({**json.loads(line), "step": step}) + "\n" for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(again))
    return folder
