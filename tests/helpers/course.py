"""A short course of training on real trainer ranks, without engines: supervised and policy updates in turn, checkpoints, resuming."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eureka_megatron.checkpoint.store import newest_whole
from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify.samples import made_up_samples


@dataclass(frozen=True)
class Course:
    """Where, on what, and how long."""

    model: str
    samples: tuple[Sample, ...]
    folder: str  # of the checkpoints
    steps: int = 4
    every: int = 2
    keep_last: int = 9
    dtype: str = "float32"
    optimizer: str = "adam"
    freeze: tuple[str, ...] = ()
    layout: Layout = Layout()
    world: int = 1

    def at(self, world: int, **layout: Any) -> "Course":
        """The same at another layout."""
        return Course(**{**self.__dict__, "layout": Layout(**layout), "world": world})


def course_samples(model: Path | str) -> tuple[Sample, ...]:
    """Three small samples with advantages of both signs; one shows pictures, one is text only."""
    random = np.random.default_rng(1)
    return tuple(
        Sample(**{**sample.__dict__, "advantages_S": (sample.mask_S * random.normal()).astype(np.float32)})
        for sample in made_up_samples(model, seed=2, pictures=(((2, 2),), (), ((1, 3), (2, 1))))
    )


def make_trainer(rank: int, course: Course) -> Any:
    """The trainer with its optimizer, before the first step."""
    from eureka_megatron.parallel.runtime import init_parallel
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(course.layout, rank=rank, world_size=course.world)
    section = OptimizerSection(
        name=course.optimizer, lr=1e-3 if course.optimizer == "adam" else 0.1, weight_decay=0.01, warmup_ratio=0.2
    )
    trainer = PolicyTrainer(
        course.model,
        parallel,
        Execution(dtype=course.dtype),
        optimizer=section,
        freeze=course.freeze,
        max_tokens_per_micro_batch=64,
    )
    trainer.start_phase(section, 2 * course.steps)
    return trainer


def one_step(trainer: Any, course: Course, step: int) -> list[float]:
    """Losses and gradient norms of a step: one supervised update, then two of the policy. Depends on the weights and `step` alone."""
    samples = course.samples[step % 2 :]
    supervised = trainer.sft(samples)
    policy = trainer.train(Batch(samples, ((0,), tuple(range(1, len(samples))))), "ppo_clip", {})
    return [value for metrics in (supervised, *policy) for _, value in sorted(metrics.items())]


def run_course(rank: int, course: Course, resume: str | None = None, notes: Path | None = None) -> dict[str, Any]:
    """→ {"losses": step → figures, "weights": digest, "errors": of the saves, "first": step}; complete on the last rank.

    `resume`: "auto", or the directory of a checkpoint. `notes`: a file that gets [step, figures] after each step.
    """
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    trainer = make_trainer(rank, course)
    folder = Path(course.folder)
    checkpoints = TrainerCheckpoints(trainer, folder, keep_last=course.keep_last)
    directory = newest_whole(folder)[0] if resume == "auto" else (Path(resume) if resume else None)
    first = checkpoints.load(directory)["step"] if directory else 0
    losses, reports = {}, []
    for step in range(first, course.steps):
        losses[step] = one_step(trainer, course, step)
        if notes:
            with notes.open("a") as file:
                file.write(json.dumps([step, losses[step]]) + "\n")
        if (step + 1) % course.every == 0:
            reports.append(checkpoints.wait())
            checkpoints.save(step + 1, {"note.txt": f"step {step}"}, note="from rank 0")
    reports.append(checkpoints.wait())
    return {
        "losses": losses,
        "weights": weights_digest(trainer),
        "errors": [report.error for report in reports if report],
        "first": first,
    }


def weights_digest(trainer: Any) -> str:
    """Of all weights, on the first rank of each replica; the others only take part."""
    digest = hashlib.blake2b()
    for name, tensor in trainer.hf_weights():
        if tensor is None:
            continue
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
