"""Supervised cold start: the trainer's ordinary step on given responses, with the token mean of −log π as its loss.

Reinforcement learning climbs only from a policy that sometimes answers right and in form; this gives it both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from eureka_megatron.checkpoint.hf_io import refuse_to_overwrite
from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import Dataset, PromptStream, load_dataset
from eureka_megatron.data.processor import make_processor
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.train.actor import TrainerGroup, model_card, start_ray
from eureka_megatron.train.checks import check_run


def supervise(trainer: TrainerGroup, dataset: Dataset, config: RunConfig, tracker: Tracker) -> None:
    """`sft.steps` optimizer steps over shuffled epochs of the rows' responses. The next samples are read while the ranks work."""
    trainer.start_phase(config.optimizer, config.sft.steps)
    stream = PromptStream(dataset, config.run.seed)
    size = config.sft.samples_per_step
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(stream.next_samples, size)
        for step in range(config.sft.steps):
            samples = ahead.result()
            if step + 1 < config.sft.steps:
                ahead = reader.submit(stream.next_samples, size)
            metrics = trainer.sft(samples)
            tracker.log(step, {f"sft/{name}": value for name, value in metrics.items()})


def run_sft(config: RunConfig) -> None:
    """`eureka sft`: from `model.path`, on the rows of `data.train`, to a Hugging Face export in `run.output`/hf."""
    refuse_to_overwrite(config.run.output / "hf")  # now, not after the last step
    check_run(config)
    data = config.data
    dataset = load_dataset(
        data.train,
        make_processor(config),
        media=data.media,
        on_bad_row=data.on_bad_row,
        rejected=config.run.output / "rejected.jsonl",
        response_key=config.sft.responses,
    )
    with ExitStack() as stack:
        start_ray(stack)
        trainer = TrainerGroup(config)
        stack.callback(trainer.close)
        trainer.start()
        tracker = stack.enter_context(Tracker(config, config.run.output, stage="sft"))
        supervise(trainer, dataset, config, tracker)
        trainer.export(config.run.output / "hf", model_card(config))
        tracker.say(f"done: weights in {config.run.output / 'hf'}")
