"""Supervised cold start: the trainer's ordinary step on given responses, with the token mean of −log π as its loss.

Reinforcement learning climbs only from a policy that sometimes answers right and in form; this gives it both.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eureka_megatron.config import SFT_EPOCHS, RunConfig
from eureka_megatron.data.dataset import PromptStream, Rows
from eureka_megatron.data.processor import make_processor
from eureka_megatron.run.checks import check_run
from eureka_megatron.run.cluster import start_ray
from eureka_megatron.run.inputs import open_dataset, settle
from eureka_megatron.run.output import replacing
from eureka_megatron.run.placement import Placement
from eureka_megatron.run.resume import (
    CheckpointSchedule,
    common_state,
    starting_point,
    tell_of_resumption,
    told_when_stopped,
)
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.train.actor import TrainerGroup, model_card


def supervise(
    trainer: TrainerGroup,
    dataset: Rows,
    config: RunConfig,
    tracker: Tracker,
    *,
    save: bool = False,
    checkpoint: Path | None = None,
) -> None:
    """`sft.steps` optimizer steps over shuffled epochs of the rows' responses.

    Args:
        config: with a number of steps, see `in_steps`.
        save: write training checkpoints, by the rules of `checkpoint`.
        checkpoint: go on after the step of this one, as if the run had never stopped.
    """
    sft, rows = config.sft, len(dataset)
    steps = counted_steps(config)
    trainer.start_phase(config.optimizer, steps)
    tracker.say(
        f"{steps:,} steps of {sft.samples_per_step:,} rows: {steps * sft.samples_per_step / rows:,.3g} epochs of {rows:,} rows, "
        f"largest learning rate {config.optimizer.lr:g}"
    )
    stream = PromptStream(dataset, config.run.seed, workers=config.data.workers, prefetch=config.data.prefetch)

    def state() -> tuple[dict[str, str], dict[str, Any]]:
        return {}, common_state(config, "sft") | {"data": stream.state_dict()}

    first = 0
    if checkpoint is not None:
        tracker.say(f"loading {checkpoint} …")
        found = trainer.load(checkpoint)
        stream.load_state_dict(found["data"])
        tell_of_resumption(checkpoint, found, config, tracker)
        first = found["step"]
    schedule = CheckpointSchedule(trainer, config, steps, state, tracker)
    for step in range(first, steps):
        metrics = trainer.sft(stream.next_samples(sft.samples_per_step))
        metrics["epoch"] = (step + 1) * sft.samples_per_step / rows
        named = {name if "/" in name else f"sft/{name}": value for name, value in metrics.items()}
        tracker.log(step, named | schedule.figures())
        if save:
            schedule.after(step)
    schedule.finish()


def in_steps(config: RunConfig, rows: int) -> RunConfig:
    """The configuration with `sft.steps` in place of epochs over so many rows."""
    sft = config.sft
    if sft.steps is not None:
        return config
    steps = math.ceil((sft.epochs or SFT_EPOCHS) * rows / sft.samples_per_step)
    return config.model_copy(update={"sft": sft.model_copy(update={"steps": steps, "epochs": None})})


def counted_steps(config: RunConfig) -> int:
    """`sft.steps`, once `in_steps` has set it."""
    assert config.sft.steps is not None, "in_steps comes first"
    return config.sft.steps


def run_sft(config: RunConfig, resume: str | None = None) -> None:
    """`eureka sft`: from `model.path`, on the rows of `data.train`, to a Hugging Face export in `run.output`/hf.

    `resume`: "auto" or the directory of a training checkpoint; see run.resume.choose_checkpoint.
    """
    config = settle(config)
    output = config.run.output / "hf"
    dataset = None
    if config.sft.steps is None:  # epochs are known once the rows are
        dataset = _open(config)
        config = in_steps(config, len(dataset))
    start = starting_point(config, resume, output, stage="sft", steps=counted_steps(config))
    if start is None:
        return
    checkpoint, first = start
    dataset = dataset or _open(config)
    with told_when_stopped(config), ExitStack() as stack:
        ranks = counted(config.parallel.world_size, "trainer rank")
        tell(f"{counted(len(dataset), 'row')}; starting Ray and {ranks}, loading {config.model.path} …")
        start_ray(stack)
        placement = Placement(config, engines=False)
        stack.callback(placement.close)
        trainer = TrainerGroup(config, placement.rank_options())
        stack.callback(trainer.close)
        trainer.start()
        placement.tell(trainer.seats)
        if trainer.unknown_device:
            tell(trainer.unknown_device)
        tracker = stack.enter_context(Tracker(config, config.run.output, stage="sft", start_step=first))
        supervise(trainer, dataset, config, tracker, save=True, checkpoint=checkpoint)
        tracker.say(f"writing the weights to {output} …")
        with replacing(output) as fresh:
            trainer.export(fresh, model_card(config, stage="sft"))
        tracker.say(f"done: weights in {output}")


def _open(config: RunConfig) -> Rows:
    check_run(config)
    processor = make_processor(config)
    tell(processor.describe_ends())
    tell(f"reading {config.data.train} …")
    return open_dataset(config, config.data.train, processor, response_key=config.sft.responses)
