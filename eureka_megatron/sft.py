"""Supervised cold start: the trainer's ordinary step on given responses, with the token mean of −log π as its loss.

Reinforcement learning climbs only from a policy that sometimes answers right and in form; this gives it both.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eureka_megatron.cluster import start_ray
from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import PromptStream, Rows, load_dataset
from eureka_megatron.data.processor import make_processor
from eureka_megatron.places import settle
from eureka_megatron.run_state import (
    Saves,
    common_state,
    replacing,
    starting_point,
    tell_of_resumption,
    told_when_stopped,
)
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.train.actor import TrainerGroup, model_card
from eureka_megatron.train.checks import check_run


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
        save: write training checkpoints, by the rules of `checkpoint`.
        checkpoint: go on after the step of this one, as if the run had never stopped.
    """
    trainer.start_phase(config.optimizer, config.sft.steps)
    stream = PromptStream(dataset, config.run.seed, workers=config.data.workers, prefetch=config.data.prefetch)

    def state() -> tuple[dict[str, str], dict[str, Any]]:
        return {}, common_state(config, "sft") | {"data": stream.state_dict()}

    first = 0
    if checkpoint is not None:
        found = trainer.load(checkpoint)
        stream.load_state_dict(found["data"])
        tell_of_resumption(checkpoint, found, config, tracker)
        first = found["step"]
    saves = Saves(trainer, config, config.sft.steps, state, tracker)
    for step in range(first, config.sft.steps):
        metrics = trainer.sft(stream.next_samples(config.sft.samples_per_step))
        tracker.log(step, {f"sft/{name}": value for name, value in metrics.items()} | saves.figures())
        if save:
            saves.after(step)
    saves.finish()


def run_sft(config: RunConfig, resume: str | None = None) -> None:
    """`eureka sft`: from `model.path`, on the rows of `data.train`, to a Hugging Face export in `run.output`/hf.

    `resume`: "auto" or the directory of a training checkpoint; see run_state.choose_checkpoint.
    """
    config = settle(config)
    output = config.run.output / "hf"
    start = starting_point(config, resume, output, stage="sft", steps=config.sft.steps)
    if start is None:
        return
    checkpoint, first = start
    check_run(config)
    data = config.data
    tell(f"reading {data.train} …")
    dataset = load_dataset(  # not inputs.open_dataset: imitation needs no answer that can be judged
        data.train,
        make_processor(config),
        media=data.media,
        on_bad_row=data.on_bad_row,
        rejected=config.run.output / "rejected.jsonl",
        response_key=config.sft.responses,
    )
    with told_when_stopped(config), ExitStack() as stack:
        ranks = counted(config.parallel.world_size, "trainer rank")
        tell(f"{counted(len(dataset), 'row')}; starting Ray and {ranks}, loading {config.model.path} …")
        start_ray(stack)
        trainer = TrainerGroup(config)
        stack.callback(trainer.close)
        trainer.start()
        tracker = stack.enter_context(Tracker(config, config.run.output, stage="sft", start_step=first))
        supervise(trainer, dataset, config, tracker, save=True, checkpoint=checkpoint)
        with replacing(output) as fresh:
            trainer.export(fresh, model_card(config, stage="sft"))
        tracker.say(f"done: weights in {output}")
