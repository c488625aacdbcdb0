"""One policy update does not depend on layout, data parallelism, packing, micro-batch size or shared prompts.

Compared are the weights after one SGD step with the whole RL loss path (advantages, old log-probabilities, clipped loss), measured by the size
of the step, and the unclipped gradient norm. Bars 1e-5 (DESIGN); measured maxima stand beside each.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify import made_up_samples
from tests.helpers.ranks import run_ranks
from tests.parity.test_shared_prompts import with_response

NAMES = ("advantages_S", "old_logprobs_S", "rollout_logprobs_S")
RATE = 1e6  # the step is far larger than the weights, so that rounding of the weights does not show


def rl_batch(directory: Path) -> Batch:
    """Samples of the made-up kind with advantages of both signs and old log-probabilities from elsewhere (so that some clip); the first and
    the third have further responses, so that rows of prompts with pictures are shared."""
    random = np.random.default_rng(3)
    alone = made_up_samples(directory, seed=5)
    others = [
        with_response(alone[place], random.integers(5, 90, size), random) for place, size in ((0, 9), (2, 6), (0, 4))
    ]
    samples = []
    for sample in [*alone, *others]:
        values = {
            name: float(value) for name, value in zip(NAMES, random.normal((0, -6, -6), (1, 0.3, 0.3)), strict=True)
        }
        spread = {name: (sample.mask_S * value).astype(np.float32) for name, value in values.items()}
        samples.append(Sample(**{**sample.__dict__, **spread}))
    return Batch(tuple(samples), (tuple(range(len(samples))),))


def update(
    rank: int, directory: str, batch: Batch, layout: dict, max_tokens: int, loss: str, options: dict, share: bool = True
) -> dict | None:
    from eureka_megatron.train.trainer import PolicyTrainer

    sizes = {name: value for name, value in layout.items() if name != "freeze"}
    parallel = init_parallel(Layout(**sizes), rank=rank, world_size=torch.distributed.get_world_size())
    section = OptimizerSection(name="sgd", lr=RATE, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
    trainer = PolicyTrainer(
        directory,
        parallel,
        optimizer=section,
        max_tokens_per_micro_batch=max_tokens,
        freeze=layout.get("freeze", ()),
    )
    trainer.share_prompts(share)
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    trainer.start_phase(section, 1)
    metrics = trainer.train(batch, loss, options)[0]
    steps = {name: tensor - before[name] for name, tensor in trainer.hf_weights() if tensor is not None}
    clipped = metrics.get("ratio_clip_upper", 0) + metrics.get("ratio_clip_lower", 0)
    return {"grad_norm": metrics["grad_norm"], "steps": steps, "clipped": clipped} if rank == 0 else None


def compare(a: dict, b: dict) -> float:
    assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-5 * b["grad_norm"]  # measured 4e-7
    errors = {
        name: ((a["steps"][name] - step).abs().max() / step.abs().max()).item() for name, step in b["steps"].items()
    }
    worst = max(errors, key=errors.get)
    print(f"{errors[worst]:.1e} at {worst}")
    return errors[worst]


@pytest.fixture(scope="module")
def plain(tiny_dir: Path) -> tuple[str, Batch, dict]:
    """One rank, all samples in one row, none of which shares its prompt's."""
    batch = rl_batch(tiny_dir)
    return str(tiny_dir), batch, run_ranks(update, 1, str(tiny_dir), batch, {}, 4096, "ppo_clip", {}, False)[0]


@pytest.mark.parametrize(
    ("layout", "world", "max_tokens"),
    [
        ({}, 1, 4096),
        ({}, 1, 160),  # several micro-batches
        ({}, 2, 4096),  # data parallel
        ({}, 2, 160),
        ({"tensor": 2}, 2, 4096),
        ({"tensor": 2, "sequence_parallel": True}, 2, 160),
        ({"pipeline": 2}, 2, 160),
        ({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 4, 160),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2, 160),
        ({"context": 2}, 2, 160),
        ({"tensor": 2, "context": 2, "sequence_parallel": True, "vision_parallel": "data"}, 4, 200),
    ],
)
def test_update_does_not_depend_on_layout_packing_or_data_parallelism(
    plain: tuple[str, Batch, dict], layout: dict, world: int, max_tokens: int
) -> None:
    directory, batch, expected = plain
    found = run_ranks(update, world, directory, batch, layout, max_tokens, "ppo_clip", {})[0]
    error = compare(found, expected)
    assert error <= 1e-5  # measured 3e-6


@pytest.mark.parametrize("freeze", [("vision", "merger"), ("vision",)])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"context": 2}])
def test_a_frozen_tower_stays_and_the_rest_moves_as_if_it_did_not(
    plain: tuple[str, Batch, dict], layout: dict, freeze: tuple[str, ...]
) -> None:
    directory, batch, expected = plain
    world = Layout(**layout).world_size
    frozen = run_ranks(update, world, directory, batch, {**layout, "freeze": freeze}, 160, "ppo_clip", {})[0]
    still = ("visual.",) if "merger" in freeze else ("visual.patch_embed.", "visual.blocks.")
    for name, step in frozen["steps"].items():
        if name.startswith(still):
            assert not step.any(), name
        else:
            other = expected["steps"][name]
            assert ((step - other).abs().max() / other.abs().max()).item() <= 1e-5, name  # measured 2e-6


def test_a_rank_without_samples_does_not_stall_the_others(tiny_dir: Path, plain: tuple[str, Batch, dict]) -> None:
    on_policy = replace(plain[1].samples[0], old_logprobs_S=None)  # else every token may be clipped
    lonely = Batch((on_policy,), ((0,),))
    one = run_ranks(update, 1, str(tiny_dir), lonely, {}, 4096, "ppo_clip", {})[0]
    other = run_ranks(update, 2, str(tiny_dir), lonely, {}, 4096, "ppo_clip", {})[0]
    assert compare(other, one) <= 1e-5  # measured 1e-6


@pytest.mark.parametrize(
    ("loss", "options"), [("gspo", {}), ("cpgd", {}), ("dapo", {"aggregation": "seq_mean"}), ("cispo", {})]
)
def test_every_loss_gives_one_update_at_two_very_different_layouts(
    tiny_dir: Path, plain: tuple[str, Batch, dict], loss: str, options: dict
) -> None:
    batch = plain[1]
    one = run_ranks(update, 1, str(tiny_dir), batch, {}, 4096, loss, options)[0]
    other = run_ranks(update, 4, str(tiny_dir), batch, {"tensor": 2, "sequence_parallel": True}, 160, loss, options)[0]
    assert one["clipped"] > 0.1, "the case must exercise clipping"
    error = compare(other, one)
    assert error <= 1e-5  # measured 3e-6
