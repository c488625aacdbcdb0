"""The reinforcement learning loop. Read `reinforce` first: it is the whole system on one screen.

`Run` holds what a run consists of: trainer ranks and engines under Ray, judges, data. `eureka train` opens one and calls `reinforce`;
`eureka demo` opens one, does a supervised cold start on the same ranks, then calls the same `reinforce`.
"""

from __future__ import annotations

from pathlib import Path

from eureka_megatron.config import RunConfig
from eureka_megatron.data.batch import (
    age_metrics,
    distributions,
    make_batch,
    mean_return,
    rewards_differ,
    rollout_metrics,
    updates_per_step,
)
from eureka_megatron.errors import UserError
from eureka_megatron.run.best import Best
from eureka_megatron.run.inputs import settle
from eureka_megatron.run.resume import CheckpointSchedule, driver_state, restore, starting_point, told_when_stopped
from eureka_megatron.run.run import Run
from eureka_megatron.tracking.tracker import Tracker


def reinforce(run: Run, tracker: Tracker, checkpoint: Path | None = None) -> list[dict[str, float]]:
    """Collect, learn, hand the weights over, `training.steps` times. → the logged metrics of every step.

    With a checkpoint it goes on after that one's step, as if it had never stopped.
    """
    config, history = run.config, []
    run.trainer.start_phase(config.optimizer, config.training.steps * updates_per_step(config))
    first = restore(run, checkpoint, tracker) if checkpoint else 0
    before = {}
    if config.training.evaluate_before and run.evaluates and first == 0:
        tracker.say("evaluating before the first step …")
        before = run.evaluate()
    best = Best(config)
    schedule = CheckpointSchedule(run.trainer, config, config.training.steps, lambda: driver_state(run), tracker)
    for step in range(first, config.training.steps):
        with tracker.phase("rollout"):
            collected = run.rollouts.take(step)  # with training.async_steps those of later steps begin now
        groups = collected.groups
        metrics = rollout_metrics(groups) | collected.metrics | {"rewards/timeouts": float(run.rewarder.timeouts)}
        metrics["timed/engine_restarts"] = float(run.pool.restarts)
        spread = {}
        if groups:
            metrics |= age_metrics(groups, run.weight_version)
            with run.trainer_turn:
                with tracker.phase("train"):
                    batch = make_batch(groups, config, step, run.weight_version)
                    metrics |= run.learn(batch) | {"train/return": mean_return(batch)}
                    metrics["train/rewards_differ"] = rewards_differ(groups, config)
                    spread = distributions(groups, batch)
                with tracker.phase("sync"):
                    metrics |= run.sync_weights(check=_due(config.sync.check_every, step))
                with tracker.phase("store"):
                    tracker.rollouts(step, groups, batch, run.processor.tokenizer.decode, run.trainer.began_with)
        if _due(config.training.evaluate_every, step) and run.evaluates:
            with tracker.phase("evaluate"):
                metrics |= {f"eval/{name}": value for name, value in run.evaluate(step + 1).items()}
        if step == 0:
            metrics |= {f"eval_before/{name}": value for name, value in before.items()}
        tracker.log(step, metrics | schedule.figures(), spread)
        history.append(metrics)
        try:
            best.after(step, metrics, run)
            if _due(config.training.export_every, step):
                tracker.say(f"writing the weights of step {step + 1} …")
                run.export(config.run.output / f"hf_step_{step + 1:06d}")
        except UserError as error:  # a full disk
            tracker.say(f"warning: no export of step {step + 1}: {error}")
        schedule.after(step)
    schedule.finish()
    return history


def train(config: RunConfig, resume: str | None = None) -> None:
    """`eureka train`: reinforcement learning from `model.path`, then a Hugging Face export in `run.output`/hf.

    `resume`: "auto" or the directory of a training checkpoint; see run.resume.choose_checkpoint.
    """
    config = settle(config)
    output = config.run.output / "hf"
    start = starting_point(config, resume, output, stage="train", steps=config.training.steps)
    if start is None:
        return
    checkpoint, first = start
    with told_when_stopped(config), Run(config) as run, Tracker(config, config.run.output, start_step=first) as tracker:
        if checkpoint is None:
            tracker.say("handing the weights to the engines, comparing every tensor on both sides …")
            run.sync_weights(check=True)
        reinforce(run, tracker, checkpoint)
        tracker.say(f"writing the weights to {output} …")
        run.export(output)
    tracker.say(f"done: weights in {output}, metrics in {config.run.output / 'metrics.jsonl'}")


def _due(every: int, step: int) -> bool:
    return every > 0 and (step + 1) % every == 0
