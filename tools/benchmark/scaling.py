"""How the time of training grows with tokens, pictures, samples and ranks; what grows faster than linearly is named.

    python tools/benchmark/scaling.py [--rounds 3] [--size tiny] [--axes tokens pictures samples ranks] [--json FILE]

Forward and backward (`PolicyTrainer.accumulate`), with the splitting and packing before it, on the tiny model, each rank with one thread:

- tokens: one sample with a response of 512, 1,024, 2,048, 4,096 tokens; attention alone is quadratic;
- pictures: one sample with 2, 4, 8, 16 pictures of 36 embeddings;
- samples: 8, 16, 32, 64 samples of 256 tokens and a small picture;
- ranks: 1, 2 (as many as there are cores, at most 4) data-parallel ranks with 8 samples each; the cost is the time of all ranks together, so that
  linear is exponent 1.

Of every size the fastest of --rounds counts, sizes in turns. The exponent k of cost ∝ size^k is that of least squares in logarithms; a fixed cost makes it smaller.
Linear is up to 1.1, for it is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import Result, arguments, build_model, exponent, in_turns, report
from PIL import Image

from eureka_megatron.config import OptimizerSection
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.samples import training_sample
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.types import Sample

LINEAR = 1.1
SIZES: dict[str, tuple[int, ...]] = {
    "tokens": (512, 1024, 2048, 4096),
    "pictures": (2, 4, 8, 16),
    "samples": (8, 16, 32, 64),
    "ranks": tuple(count for count in (1, 2, 4) if count <= (os.cpu_count() or 1)),
}
SAMPLES_OF_A_RANK = 8
WHERE = {  # the time goes, should an axis cost more than linearly
    "tokens": "attention is quadratic in the tokens of one response, all else linear",
    "pictures": "attention of the text is quadratic in the embeddings of one prompt, all else linear",
    "samples": "packed rows are filled to the same limit: memory that no longer stays in the processor's caches",
    "ranks": "the reduction of gradients, and cores that share their caches and memory",
}


def sample(processor: Processor, folder: Path, number: int, tokens: int, pictures: int, side: int) -> Sample:
    """A response of so many random tokens to a question with pictures of side × side embeddings, no two alike."""
    random = np.random.default_rng(number)
    content = []
    for place in range(pictures):
        path = folder / f"{number}-{place}.png"
        Image.fromarray(random.integers(0, 256, (28 * side, 28 * side, 3), dtype=np.uint8)).save(path)
        content.append({"type": "image", "image": str(path)})
    content.append({"type": "text", "text": "How many?"})
    prompt = processor.prompt([{"role": "user", "content": content}], id=str(number), folders=(folder,))
    return training_sample(prompt, random.integers(0, 256, tokens))


def samples_of(axis: str, size: int, processor: Processor, folder: Path) -> list[Sample]:
    if axis == "tokens":
        return [sample(processor, folder, size, size, 1, 2)]
    if axis == "pictures":
        return [sample(processor, folder, size, 32, size, 6)]
    count = size if axis == "samples" else size * SAMPLES_OF_A_RANK
    return [sample(processor, folder, number, 224, 1, 2) for number in range(count)]


def trainer_of(folder: Path, rank: int, ranks: int) -> PolicyTrainer:
    torch.set_num_threads(1)
    parallel = init_parallel(Layout(data=ranks), rank=rank, init_method=f"file://{folder}/rendezvous-{ranks}")
    options: dict[str, Any] = {"optimizer": OptimizerSection(name="sgd"), "max_tokens_per_micro_batch": 8192}
    return PolicyTrainer(folder / "model", parallel, Execution(), **options)


def on_ranks(rank: int, ranks: int, folder: Path, rounds: int) -> float:
    """Fastest seconds of the ranks together, on every rank."""
    processor = Processor(folder / "model", min_pixels=None, max_pixels=None, max_prompt_tokens=8192)
    own = folder / f"of-{ranks}-{rank}"
    own.mkdir()
    samples, trainer = samples_of("ranks", ranks, processor, own), trainer_of(folder, rank, ranks)

    def together() -> None:
        dist.barrier()
        trainer.accumulate(samples)
        dist.barrier()

    found = min(in_turns({"": together}, rounds)[""])
    dist.destroy_process_group()
    return found


def costs_of_ranks(folder: Path, rounds: int) -> list[float]:
    costs = []
    for ranks in SIZES["ranks"]:
        with multiprocessing.get_context("spawn").Pool(ranks) as pool:
            seconds = pool.starmap(on_ranks, [(rank, ranks, folder, rounds) for rank in range(ranks)])
        costs.append(max(seconds) * ranks)
    return costs


def costs_of(axes: Sequence[str], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Of the axes within one rank."""
    processor = Processor(folder / "model", min_pixels=None, max_pixels=None, max_prompt_tokens=8192)
    trainer = trainer_of(folder, 0, 1)
    found = {}
    for axis in axes:
        tasks: dict[str, Callable[[], object]] = {}
        for size in SIZES[axis]:
            samples = samples_of(axis, size, processor, folder)
            tasks[str(size)] = partial(trainer.accumulate, samples)
        found[axis] = [min(values) for values in in_turns(tasks, rounds).values()]
    dist.destroy_process_group()
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--size", choices=("tiny", "medium"), default="tiny")
    parser.add_argument("--axes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        build_model(folder / "model", options.size)
        costs: dict[str, list[float]] = {}
        if "ranks" in options.axes and len(SIZES["ranks"]) > 1:
            costs["ranks"] = costs_of_ranks(folder, options.rounds)
            (folder / "rendezvous-1").unlink(missing_ok=True)
        costs |= costs_of([axis for axis in options.axes if axis != "ranks"], folder, options.rounds)
    results = []
    for axis, values in costs.items():
        told = ", ".join(f"{size} {value:.3f} s" for size, value in zip(SIZES[axis], values, strict=True))
        print(f"  {axis:9} {told}", flush=True)
        details = {"sizes": SIZES[axis], "seconds": values}
        power = exponent(SIZES[axis], values)
        results.append(
            Result(
                f"exponent of the cost of {axis}",
                power,
                goal=LINEAR,
                at_least=False,
                peer=told,
                where=WHERE[axis],
                details=details,
            )
        )
    worse = [result.what.rpartition(" ")[2] for result in results if not result.met]
    print(f"worse than linear: {', '.join(worse) or 'nothing'}")
    report(results, options.json)


if __name__ == "__main__":
    main()
