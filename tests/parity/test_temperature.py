"""The policy at temperature T is softmax(logits / T): at every layout its update is that of a model whose output layer is divided by T."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.config import OptimizerSection
from eureka_megatron.models.qwen2_5_vl.forms import build_published
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch
from tests.helpers.ranks import run_ranks
from tests.parity.test_update_invariance import RATE, compare, rl_batch

SECTION = OptimizerSection(name="sgd", lr=RATE, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
# Corrected by the engine's log-probabilities, with an entropy bonus and a KL term to another policy: all of them are at T.
OPTIONS = {"correction": "token_tis", "entropy_coefficient": 0.01, "kl_coefficient": 0.1, "kl_estimator": "k3"}
HEAD = "lm_head.weight"


def updates(
    rank: int, directory: str, reference: str, batch: Batch, layout: dict[str, Any], temperature: float
) -> dict[str, Any] | None:
    """The SGD step of two losses from the same weights, and the log-probabilities before."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(**layout, rank=rank, world_size=torch.distributed.get_world_size())
    trainer = PolicyTrainer(directory, parallel, optimizer=SECTION, reference=reference, max_tokens_per_micro_batch=200)
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    found = {}
    for loss in ("ppo_clip", "gspo"):
        trainer.start_phase(SECTION, 1)
        metrics = trainer.train(batch, loss, OPTIONS, temperature=temperature)[0]
        steps = {key: tensor - before[key] for key, tensor in trainer.hf_weights() if tensor is not None}
        found[loss] = {"grad_norm": metrics["grad_norm"], "steps": steps}
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
    return found if rank == 0 else None


@pytest.fixture(scope="module", params=[0.5, 2.0])
def scaled(
    request: Any, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, list[str], Batch, Any]:
    """(T, the policy and its reference, samples, the updates at T = 1 of both with output layers divided by T)."""
    temperature, folder = request.param, tmp_path_factory.mktemp("scaled")
    build_published(folder / "reference", seed=9, randomize_all=True)
    paths = [tiny_dir, folder / "reference"]
    divided = []
    for number, path in enumerate(paths):
        target = folder / str(number)
        target.mkdir()
        for file in path.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        weights = load_file(path / "model.safetensors")
        save_file({**weights, HEAD: weights[HEAD] / temperature}, target / "model.safetensors", {"format": "pt"})
        divided.append(str(target))
    batch = rl_batch(tiny_dir)
    expected = run_ranks(updates, 1, *divided, batch, {}, 1.0)[0]
    for found in expected.values():  # d/dW of f(W / T)
        found["steps"][HEAD] /= temperature
    return temperature, [str(path) for path in paths], batch, expected


@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"context": 2}], ids=str
)
def test_the_update_at_a_temperature_is_that_of_scaled_logits(scaled: Any, layout: dict[str, Any]) -> None:
    temperature, paths, batch, expected = scaled
    found = run_ranks(updates, 2 if layout else 1, *paths, batch, layout, temperature)[0]
    for loss, result in found.items():
        # The norm counts the output layer's own gradient, which the other model has times T.
        squares = sum((step.double() ** 2).sum() for step in expected[loss]["steps"].values())
        wanted = expected[loss] | {"grad_norm": float(squares**0.5) / RATE}
        error = compare(result, wanted)
        print(f"temperature {temperature} {layout} {loss}: {error:.1e}")
        assert error <= 1e-5
