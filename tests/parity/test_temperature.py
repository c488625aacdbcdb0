"""The policy at temperature T is softmax(logits / T): at every layout its update is that of a model whose output layer is divided by T."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.config import OptimizerSection
from eureka_megatron.demo.forms import build_published
from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch
from tests.helpers.ranks import run_ranks
from tests.parity.test_update_invariance import RATE, compare, rl_batch

SECTION = OptimizerSection(name="sgd", lr=RATE, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
# Corrected by the engine's log-probabilities, with an entropy bonus and a KL term to another policy: all of them are at T.
OPTIONS = {"correction": "token_tis", "entropy_coefficient": 0.01, "kl_coefficient": 0.1, "kl_estimator": "k3"}
HEAD = "lm_head.weight"
TEMPERATURES = (0.5, 2.0)


def updates(
    rank: int, directory: str, reference: str, batch: Batch, layout: dict[str, Any], temperatures: tuple[float, ...]
) -> dict[tuple[float, str], dict[str, Any]] | None:
    """The SGD step of two losses at each temperature, always from the same weights."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    trainer = PolicyTrainer(directory, parallel, optimizer=SECTION, reference=reference, max_tokens_per_micro_batch=200)
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    found = {}
    for temperature, loss in product(temperatures, ("ppo_clip", "gspo")):
        trainer.start_phase(SECTION, 1)
        metrics = trainer.train(batch, loss, OPTIONS, temperature=temperature)[0]
        steps = {key: tensor - before[key] for key, tensor in trainer.hf_weights() if tensor is not None}
        found[temperature, loss] = {"grad_norm": metrics["grad_norm"], "steps": steps}
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
    return found if rank == 0 else None


@pytest.fixture(scope="module")
def scaled(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Batch, dict[Any, Any]]:
    """(the policy and its reference, samples, the updates at T = 1 of both with output layers divided by each temperature)."""
    folder, batch, expected = tmp_path_factory.mktemp("scaled"), rl_batch(tiny_dir), {}
    paths = [tiny_dir, build_published(folder / "reference", seed=9, randomize_all=True)]
    for temperature in TEMPERATURES:
        divided = [str(divide(path, folder / f"{path.name} at {temperature}", temperature)) for path in paths]
        for (_, loss), found in run_ranks(updates, 1, *divided, batch, {}, (1.0,))[0].items():
            found["steps"][HEAD] /= temperature  # d/dW of f(W / T)
            # So the norm that counts the output layer's own gradient, which the other model has times T, is to be taken anew.
            squares = sum((step.double() ** 2).sum() for step in found["steps"].values())
            expected[temperature, loss] = found | {"grad_norm": float(squares**0.5) / RATE}
    return [str(path) for path in paths], batch, expected


def divide(path: Path, target: Path, temperature: float) -> Path:
    shutil.copytree(path, target)
    weights = load_file(path / "model.safetensors")
    save_file({**weights, HEAD: weights[HEAD] / temperature}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"context": 2}], ids=str
)
def test_the_update_at_a_temperature_is_that_of_scaled_logits(scaled: Any, layout: dict[str, Any]) -> None:
    paths, batch, expected = scaled
    found = run_ranks(updates, 2 if layout else 1, *paths, batch, layout, TEMPERATURES)[0]
    assert found.keys() == expected.keys()
    for (temperature, loss), result in found.items():
        error = compare(result, expected[temperature, loss])
        print(f"temperature {temperature} {layout} {loss}: {error:.1e}")
        assert error <= 1e-5  # measured 1.9e-6
