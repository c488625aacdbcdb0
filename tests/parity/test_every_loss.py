"""Every loss with every aggregation gives one update, whatever the layout, packing and micro-batch size (DESIGN: 1e-5 of the step).

Per layout one set of ranks goes through all cases: the trainer's weights are put back after each. KL, entropy bonus, dual clip and the
rollout corrections ride along, so that each appears with several losses.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.rl.losses import AGGREGATIONS, CORRECTIONS, LOSSES
from eureka_megatron.types import Batch
from tests.helpers.ranks import run_ranks
from tests.parity.test_update_invariance import RATE, compare, rl_batch

SECTION = OptimizerSection(name="sgd", lr=RATE, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({}, 160),  # several micro-batches
    ({}, 140),  # one sample a micro-batch, or two
    ({"data": 2}, 4096),
    ({"tensor": 2, "sequence_parallel": True}, 160),
    ({"pipeline": 2, "virtual_pipeline": 2}, 160),
    ({"context": 2}, 200),
    ({"tensor": 2, "pipeline": 2}, 4096),
]


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """One for each loss and aggregation; the further options take turns."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, (loss, aggregation) in enumerate(
        (loss, aggregation) for loss in LOSSES for aggregation in AGGREGATIONS
    ):
        options: dict[str, Any] = {"aggregation": aggregation, "correction": CORRECTIONS[number % len(CORRECTIONS)]}
        if aggregation == "seq_sum_norm":
            options["sequence_norm_tokens"] = 64.0
        if number % 2:
            options["entropy_coefficient"] = 0.01
        if loss in ("ppo_clip", "dapo", "gspo"):
            options["dual_clip"] = 3.0
        found[f"{loss}-{aggregation}"] = (loss, options)
    return found


def updates(rank: int, directory: str, batch: Batch, layout: dict[str, Any], max_tokens: int) -> dict[str, Any] | None:
    """The step of every case, from the same weights."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    trainer = PolicyTrainer(directory, parallel, optimizer=SECTION, max_tokens_per_micro_batch=max_tokens)
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    found = {}
    for name, (loss, options) in cases().items():
        trainer.start_phase(SECTION, 1)
        metrics = trainer.train(batch, loss, options)[0]
        steps = {key: tensor - before[key] for key, tensor in trainer.hf_weights() if tensor is not None}
        found[name] = {"grad_norm": metrics["grad_norm"], "steps": steps}
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
    return found if rank == 0 else None


@pytest.fixture(scope="module")
def plain(tiny_dir: Path) -> tuple[str, Batch, dict[str, Any]]:
    batch = rl_batch(tiny_dir)
    return str(tiny_dir), batch, run_ranks(updates, 1, str(tiny_dir), batch, {}, 4096)[0]


def test_the_cases_differ(plain: tuple[str, Batch, dict[str, Any]]) -> None:
    """Were an option ignored, two cases would give one update and the comparison below would prove less than it says."""
    norms = [found["grad_norm"] for found in plain[2].values()]
    assert len({f"{norm:.6g}" for norm in norms}) == len(norms) == len(LOSSES) * len(AGGREGATIONS)


@pytest.mark.parametrize(("layout", "max_tokens"), LAYOUTS)
def test_one_update_at_every_layout(
    plain: tuple[str, Batch, dict[str, Any]], layout: dict[str, Any], max_tokens: int
) -> None:
    directory, batch, expected = plain
    world = Layout(**layout).world_size
    found = run_ranks(updates, world, directory, batch, layout, max_tokens, timeout_seconds=400)[0]
    worst = {name: compare(found[name], expected[name]) for name in expected}
    print(layout, f"largest {max(worst.values()):.1e} at {max(worst, key=worst.get)}")
    assert max(worst.values()) <= 1e-5  # measured: 4.5e-6 (context parallel), 2.6e-6 elsewhere
