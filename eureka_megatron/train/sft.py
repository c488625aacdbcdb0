"""Supervised cold start: the trainer's ordinary step on given responses, with the token mean of −log π as its loss.

Reinforcement learning climbs only from a policy that sometimes answers right and in form; this gives it both.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.errors import UserError
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.train.actor import TrainerGroup, start_ray


def supervise(trainer: TrainerGroup, dataset: Any, processor: Processor, config: RunConfig, tracker: Tracker) -> None:
    """`sft.steps` optimizer steps over shuffled epochs of the rows' responses."""
    key = config.sft.responses
    trainer.start_phase(config.optimizer, config.sft.steps)
    order = _epochs(len(dataset), config.run.seed)
    for step in range(config.sft.steps):
        samples = []
        for _ in range(config.sft.samples_per_step):
            index = next(order)
            response = dataset.extra(index, key)
            if not isinstance(response, str):
                raise UserError(f"{dataset[index].origin}: key {key!r} (sft.responses) is missing or not a string")
            samples.append(processor.sft_sample(dataset[index], response))
        with tracker.phase("sft"):
            metrics = trainer.sft(samples)
        tracker.log(step, {f"sft/{name}": value for name, value in metrics.items()})


def _epochs(size: int, seed: int) -> Any:
    epoch = 0
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(size).tolist()
        epoch += 1


def run_sft(config: RunConfig) -> None:
    """`eureka sft`: from `model.path`, on the rows of `data.train`, to a Hugging Face export in `run.output`/hf."""
    data = config.data
    processor = Processor(
        config.model.path,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_prompt_tokens=data.max_prompt_tokens,
        system_prompt=data.system_prompt,
    )
    dataset = load_dataset(data.train, processor, media=data.media, on_bad_row=data.on_bad_row)
    with ExitStack() as stack:
        start_ray(stack)
        trainer = TrainerGroup(config)
        stack.callback(trainer.close)
        trainer.start()
        tracker = stack.enter_context(Tracker(config, config.run.output, stage="sft"))
        supervise(trainer, dataset, processor, config, tracker)
        trainer.export(config.run.output / "hf", {"config": config.model_dump(mode="json"), "scores": {}})
        tracker.say(f"done: weights in {config.run.output / 'hf'}")
