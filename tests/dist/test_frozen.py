"""What freezing saves, counted on real ranks: gradient bytes, optimizer bytes, and runs of the vision tower."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl import read_hf_config
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify import made_up_samples
from eureka_megatron.weights import hf_metadata
from tests.helpers.ranks import run_ranks

SECTION = OptimizerSection(name="adam", lr=1e-3, schedule="constant", warmup_ratio=0.0)
FREEZE = ("vision", "merger")
LAYOUTS = {
    "one rank": {},
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "dp2": {"data": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "tp2-shared-dp2": {"tensor": 2, "data": 2, "vision_parallel": "data"},
    "tp2-split": {"tensor": 2, "vision_parallel": "tensor"},
}


def rl_step(directory: Path) -> Batch:
    """Four responses to each of two prompts with pictures and one of text, in two updates."""
    prompts = made_up_samples(directory, pictures=(((3, 3),), ((2, 5), (1, 1)), ()))
    samples = [
        replace(sample, advantages_S=sample.mask_S * (number - 1.5), rollout_logprobs_S=sample.mask_S * -6.0)
        for number in range(4)
        for sample in prompts
    ]
    return Batch(tuple(samples), (tuple(range(6)), tuple(range(6, 12))))


def bytes_of(trainer: Any) -> tuple[int, int]:
    """Gradient buffers and optimizer state of this rank."""
    gradients = sum(buffer.grad_data.nbytes for chunk in trainer.chunks for buffer in chunk.buffers)
    inner = (
        trainer.optimizer.chained_optimizers
        if hasattr(trainer.optimizer, "chained_optimizers")
        else [trainer.optimizer]
    )
    state = [value for one in inner for values in one.optimizer.state.values() for value in values.values()]
    return gradients, sum(value.nbytes for value in state if torch.is_tensor(value) and value.dim())


def step(rank: int, directory: str, batch: Batch, layout: dict[str, Any], freeze: tuple[str, ...]) -> dict[str, Any]:
    """One RL step of two updates and two passes; what it cost."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    trainer = PolicyTrainer(
        directory,
        parallel,
        freeze=freeze,
        max_tokens_per_micro_batch=200,
        optimizer=SECTION,
    )
    trainer.start_phase(SECTION, 4)
    patches: list[int] = []
    tower = getattr(trainer.chunks[0].module, "vision", None)
    if tower is not None:
        tower.patch_embed.register_forward_hook(lambda module, inputs, output: patches.append(len(inputs[0])))
    trainer.train(batch, "ppo_clip", {}, passes=2)
    tower_bytes = sum(parameter.nbytes for parameter in tower.parameters()) if tower is not None else 0
    gradients, state = bytes_of(trainer)
    return {"patches": sum(patches), "tower": tower_bytes, "gradients": gradients, "state": state}


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> Batch:
    return rl_step(tiny_dir)


def distinct_patches(samples: tuple[Sample, ...]) -> int:
    return sum({p.key: len(p.patches_PD) for sample in samples for p in sample.pictures}.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_frozen_tower_sees_each_picture_once_in_a_whole_step(tiny_dir: Path, batch: Batch, name: str) -> None:
    layout = LAYOUTS[name]
    world = Layout(**layout).world_size
    found = run_ranks(step, world, str(tiny_dir), batch, layout, FREEZE)
    # Over all ranks; ranks that split the tower's weights work on each picture together.
    together = layout["tensor"] if layout.get("vision_parallel") == "tensor" else 1
    assert sum(one["patches"] for one in found) == distinct_patches(batch.samples) * together


def test_no_gradient_and_no_optimizer_state_for_what_is_frozen(tiny_dir: Path, batch: Batch) -> None:
    every = run_ranks(step, 1, str(tiny_dir), batch, {}, ())[0]
    frozen = run_ranks(step, 1, str(tiny_dir), batch, {}, FREEZE)[0]
    # fp32: as many bytes of gradient as of weights, and two moments.
    saved = every["gradients"] - frozen["gradients"]
    print(f"gradients {every['gradients']} → {frozen['gradients']}, optimizer {every['state']} → {frozen['state']}")
    sizes = hf_metadata(read_hf_config(tiny_dir))
    rest = sum(4 * torch.Size(shape).numel() for name, shape in sizes if not name.startswith("visual."))
    assert rest <= frozen["gradients"] < rest * 1.01, (
        "nothing but the language model has gradients (buffers are padded)"
    )
    assert rest * 2 <= frozen["state"] < rest * 2.02
    assert saved >= frozen["tower"]


def test_a_pattern_that_matches_nothing_is_an_error(tiny_dir: Path, batch: Batch) -> None:
    with pytest.raises(AssertionError, match=r"model\.freeze: 'visual\.block\.\*' matches no tensor"):
        run_ranks(step, 1, str(tiny_dir), batch, {}, ("visual.block.*",))
    assert ConfigError.exit_code == 2
