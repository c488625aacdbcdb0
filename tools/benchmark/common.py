"""What the benchmarks share: models of three sizes, questions with pictures, timing in turns, the machine's own limits, one way to report.

A script prints a table and then one JSON line a result:

    {"what": "step, tiny", "value": 0.65, "unit": "×", "goal": 1.5, "met": false, "peer": "TRL 0.57 s", …}

`value` is a median of ratios of neighbours in time, never a ratio of medians: what else a machine does then slows both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from eureka_megatron.config import RunConfig
    from eureka_megatron.run.run import Run

# Options of demo.tiny.build_tiny: 1.8, 39 and 400 million parameters.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "medium": {
        "text_hidden": 512, "text_layers": 10, "text_heads": 8, "kv_heads": 2, "ffn": 1408, "vocab_size": 2048,
        "vision_hidden": 256, "vision_depth": 8, "vision_heads": 4, "vision_ffn": 768, "full_attention_blocks": (3, 7),
    },
    "large": {
        "text_hidden": 1024, "text_layers": 24, "text_heads": 16, "kv_heads": 4, "ffn": 4096, "vocab_size": 4096,
        "vision_hidden": 512, "vision_depth": 8, "vision_heads": 8, "vision_ffn": 1024, "full_attention_blocks": (3, 7),
    },
}  # fmt: skip


# --- results ---


@dataclass(frozen=True)
class Result:
    """One figure. Example: Result("step, tiny", 0.65, "×", goal=1.5, peer="TRL 0.57 s")."""

    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_least: bool = True  # of the goal: it bounds from below
    peer: str = ""  # the other's own figure, as text
    where: str = ""  # the time goes, for when the goal is missed
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def line(self) -> str:
        return json.dumps({**asdict(self), "met": self.met}, ensure_ascii=False)

    @classmethod
    def read(cls, line: str) -> Result:
        """The inverse of `line`."""
        values = json.loads(line)
        del values["met"]
        return cls(**values)


def table(results: Sequence[Result]) -> str:
    """What, value, goal, whether it is met, and the peer's figure."""
    rows = [("what", "value", "goal", "", "peer")]
    for result in results:
        sign = "≥" if result.at_least else "≤"
        goal = "" if result.goal is None else f"{sign} {result.goal:g}"
        word = {None: "", True: "met", False: "missed"}[result.met]
        rows.append((result.what, f"{result.value:.4g} {result.unit}".strip(), goal, word, result.peer))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def report(results: Sequence[Result], file: Path | None) -> None:
    """The table, one JSON line a result, and the lines into the file."""
    lines = [result.line() for result in results]
    missed = [f"missed: {result.what}: {result.where}" for result in results if result.met is False]
    print("", table(results), "", *missed, *lines, sep="\n", flush=True)
    if file is not None:
        file.write_text("".join(line + "\n" for line in lines))


def arguments(doc: str | None, *, rounds: int, threads: bool = False) -> argparse.ArgumentParser:
    """A parser with what all scripts take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"pairs of measurements (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON lines here too")
    if threads:
        parser.add_argument(
            "--threads", type=int, default=os.cpu_count() or 1, help="of both sides; default: all cores"
        )
    return parser


# --- statistics ---


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of neighbours. Example: [2, 9], [1, 3] → 2.5."""
    return median(a / b for a, b in zip(above, below, strict=True))


def slope(values: Sequence[float]) -> float:
    """Of the line of least squares through values at 0, 1, 2, …. Example: [5, 7, 9] → 2."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    square = sum((place - middle) ** 2 for place in range(len(values)))
    return sum((place - middle) * (value - mean) for place, value in enumerate(values)) / square


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """k of cost ∝ size^k, by least squares of the logarithms. Example: [1, 2, 4], [3, 12, 48] → 2."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


# --- time ---


def seconds_of(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def in_turns(tasks: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each task, `rounds` times, after `warmup` rounds that do not count; who begins changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-warmup, rounds):
        for name in list(tasks)[:: 1 if number % 2 == 0 else -1]:
            taken = seconds_of(tasks[name])
            if number >= 0:
                found[name].append(taken)
    return found


def matrix_rate(side: int = 1024, seconds: float = 0.25) -> float:
    """Operations a second of fp32 products of square matrices, with torch's present number of threads; the median of some."""
    import torch

    a, b = (torch.randn(side, side) for _ in range(2))
    out, until = torch.empty(side, side), time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < until:
        taken.append(seconds_of(lambda: torch.mm(a, b, out=out)))
    return 2 * side**3 / median(taken)


# --- models and data ---


def build_model(directory: Path, size: str, **options: Any) -> Path:
    """A checkpoint of random weights in a published form."""
    from transformers.utils import logging as transformers_logging

    from eureka_megatron.demo.forms import build_published

    transformers_logging.disable_progress_bar()
    return build_published(directory, seed=3, randomize_all=True, **{**SIZES[size], **options})


def write_questions(folder: Path, rows: int, side: int) -> Path:
    """`folder`/train.jsonl: questions of the counting task, each with a picture of side × side pixels."""
    from eureka_megatron.demo.counting import draw, examples

    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(islice(examples(7), rows)):
        picture = f"images/{number:05d}.png"
        draw(example).resize((side, side)).save(folder / picture, compress_level=1)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": example.question}]
        message = json.dumps([{"role": "user", "content": content}])
        lines.append(json.dumps({"id": str(number), "message": message, "answer": str(example.answer)}) + "\n")
    path = folder / "train.jsonl"
    path.write_text("".join(lines))
    return path


# --- runs ---

PLAIN = [
    "parallel.tensor=1",
    "parallel.sequence_parallel=false",
    "data.test=null",
    "data.max_prompt_tokens=128",
    "rollout.max_model_tokens=256",
    "training.evaluate_every=0",
    "algorithm.filter.enabled=false",
    "sync.check_every=0",
    "checkpoint.every=0",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
    "tracking.console=false",
]


def run_config(folder: Path, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """One trainer rank and one engine on `folder`/model and `folder`/data, into `folder`/`name`."""
    from eureka_megatron.demo.story import demo_config

    return demo_config(folder.absolute(), [*PLAIN, f"run.output={folder.absolute() / name}", *overrides])


@contextmanager
def opened(config: RunConfig) -> Iterator[Run]:
    """The run, its responses all `rollout.max_response_tokens` long: nothing ends them, as with `ignore_eos` elsewhere."""
    from eureka_megatron.rollout.engine import Engine, EngineOptions, Work
    from eureka_megatron.rollout.pool import RolloutPool
    from eureka_megatron.run.run import Run
    from eureka_megatron.types import Sampling

    class Endless(Engine):  # local, so that Ray sends it by value
        def __init__(self, options: EngineOptions) -> None:
            super().__init__(options)
            self._stop_ids = []

        def _take_up(self, work: Sequence[Work], sampling: Sampling) -> None:
            from functools import partial
            from unittest import mock

            import vllm

            with mock.patch.object(vllm, "SamplingParams", partial(vllm.SamplingParams, ignore_eos=True)):
                super()._take_up(work, sampling)

    patched = mock.patch(
        "eureka_megatron.run.run.RolloutPool",
        lambda config, options: RolloutPool(config, options, engine_class=Endless),
    )
    with patched, Run(config) as run:
        yield run
