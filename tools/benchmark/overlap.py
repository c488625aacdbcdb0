"""Shows what `training.async_steps` gains: the time of a step against the longer of its two sides, rollouts and training.

    python tools/benchmark/overlap.py [--generate 3] [--train 3] [--steps 6] [--async 0 1 2] [--json FILE]

Real processes throughout: trainer ranks, a vLLM engine, Ray, judges, syncs, on the demo's task with a small untrained model. Both sides are
slowed by sleeping, an engine in equal parts for each finished prompt, a rank before each step: two cores stand for two groups of GPUs, of which each
works while the other does. Prints for each depth the median over steps (the first two and the last left out: pipes fill and empty) of seconds a
step, of rollouts, of training with sync, and the ratio of the first to the longer of the others; the goal above 0 is 1.15.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.demo.story import demo_config
from eureka_megatron.loop import reinforce
from eureka_megatron.rollout.engine import Engine, Work
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.run import Run
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.train.actor import TrainerRank
from eureka_megatron.train.parcel import Share
from eureka_megatron.types import Rollout, Sampling

GOAL = 1.15
PROMPTS = 8
CONFIG = [
    f"training.prompts_per_step={PROMPTS}",
    f"training.responses_per_update={2 * PROMPTS}",
    "training.evaluate_every=0",
    "rollout.samples_per_prompt=2",
    "rollout.max_concurrent=8",
    "algorithm.filter.enabled=false",
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "sync.check_every=0",
    "checkpoint.every=0",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
]


def slow_classes(generate: float, train: float) -> tuple[type[Engine], type[TrainerRank]]:
    """Local classes, which Ray sends by value."""

    class SlowEngine(Engine):
        def serve(
            self, work: Sequence[Work], sampling: Sampling, seconds: float
        ) -> tuple[int, dict[int, list[Rollout]]]:
            found = super().serve(work, sampling, seconds)
            time.sleep(generate / PROMPTS * len(found[1]))
            return found

    class SlowRank(TrainerRank):
        def train(self, share: Share) -> list[dict[str, float]]:
            time.sleep(train)
            return super().train(share)

    return SlowEngine, SlowRank


def measure(folder: Path, depth: int, options: argparse.Namespace) -> dict[str, float]:
    """A run of `options.steps` steps at this depth."""
    config = demo_config(folder, [*CONFIG, f"training.steps={options.steps}", f"training.async_steps={depth}"])
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": folder / f"run-{depth}"})})
    engine, rank = slow_classes(options.generate, options.train)
    with (
        mock.patch("eureka_megatron.run.run.RolloutPool", lambda c, o: RolloutPool(c, o, engine_class=engine)),
        mock.patch("eureka_megatron.train.actor.TrainerRank", rank),
        Run(config) as run,
        Tracker(config, config.run.output) as tracker,
    ):
        run.sync_weights(check=True)
        reinforce(run, tracker)
    lines = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    taken = [later["time"] - line["time"] for line, later in itertools.pairwise(lines)]
    inner = slice(2, -1)
    found = {
        "step": median(taken[1:-1]),
        "generate": median(line["rollout/seconds"] + line["rollout/judge_seconds"] for line in lines[inner]),
        "train": median(line["time/train"] + line["time/sync"] for line in lines[inner]),
        "age": max(line["rollout/age_max"] for line in lines),
        "carried_over": median(line["rollout/carried_over"] for line in lines[inner]),
    }
    return {**found, "ratio": found["step"] / max(found["generate"], found["train"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", type=float, default=3.0, help="seconds added to a step's rollouts")
    parser.add_argument("--train", type=float, default=3.0, help="seconds added to a step's training")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--async", dest="depths", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overlap-") as name:
        folder = Path(name)
        write_counting(folder / "data", train=200, test=4)
        build_published(folder / "model", seed=3, randomize_all=True)
        report = {depth: measure(folder, depth, options) for depth in options.depths}
    print("async_steps  step s  rollouts s  train+sync s  ratio  largest age  carried over")
    for depth, found in report.items():
        met = "" if not depth else ("  met" if found["ratio"] <= GOAL else "  missed")
        print(
            f"{depth:11d}  {found['step']:6.2f}  {found['generate']:10.2f}  {found['train']:12.2f}  {found['ratio']:5.2f}"
            f"  {found['age']:11.0f}  {found['carried_over']:12.2f}{met}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
