"""The reference policy: its log-probabilities are those of its checkpoint, the policy's weights survive the swap bit for bit, and an update
with KL, in the loss or in the reward, does not depend on the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.demo.forms import build_published
from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.rl.shaping import Shaping
from eureka_megatron.types import Batch
from tests.helpers.ranks import run_ranks
from tests.parity.test_update_invariance import RATE, compare, rl_batch

SECTION = OptimizerSection(name="sgd", lr=RATE, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
CASES: dict[str, tuple[dict[str, Any], Shaping | None]] = {
    "loss": ({"kl_coefficient": 0.5, "kl_estimator": "k3"}, None),
    "reward": ({}, Shaping(kl_coefficient=0.5, kl_estimator="k1", gamma=0.95, whitened=True)),
}
LAYOUTS = [
    ({"data": 2}, 4096),
    ({"pipeline": 2, "virtual_pipeline": 2}, 160),
    ({"tensor": 2, "sequence_parallel": True, "context": 2}, 200),
]


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_published(tmp_path_factory.mktemp("reference") / "hf", seed=5, randomize_all=True)


def trainer_at(layout: dict[str, Any], rank: int, directory: str, **options: Any) -> Any:
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    return PolicyTrainer(directory, parallel, optimizer=SECTION, **options)


def swapped(rank: int, directory: str, reference: str, batch: Batch, freeze: tuple[str, ...]) -> Any:
    trainer = trainer_at({}, rank, directory, reference=reference, freeze=freeze)
    other = trainer_at({}, rank, reference)
    before = [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]
    with trainer.reference.swapped_in():
        found = trainer.logprobs(batch.samples)
    unchanged = all(map(torch.equal, before, trainer.chunks[0].parameters()))
    expected = other.logprobs(batch.samples)
    own = trainer.logprobs(batch.samples)
    equal = all(map(torch.equal, found, expected))
    return (
        unchanged,
        equal,
        max((a - b).abs().max().item() for a, b in zip(own, expected, strict=True)),
        trainer.reference.nbytes,
    )


def update(
    rank: int, directory: str, reference: str, batch: Batch, layout: dict[str, Any], max_tokens: int, case: str
) -> Any:
    options, shaping = CASES[case]
    trainer = trainer_at(layout, rank, directory, reference=reference, max_tokens_per_micro_batch=max_tokens)
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    trainer.start_phase(SECTION, 1)
    metrics = trainer.train(batch, "ppo_clip", options, shaping=shaping)[0]
    steps = {name: tensor - before[name] for name, tensor in trainer.hf_weights() if tensor is not None}
    return {"grad_norm": metrics["grad_norm"], "steps": steps, "kl": metrics.get("kl")} if rank == 0 else None


@pytest.mark.parametrize("freeze", [(), ("vision",)])
def test_the_swap_is_exact_both_ways(tiny_dir: Path, reference_dir: Path, freeze: tuple[str, ...]) -> None:
    batch = rl_batch(tiny_dir)
    unchanged, equal, apart, nbytes = run_ranks(swapped, 1, str(tiny_dir), str(reference_dir), batch, freeze)[0]
    assert unchanged
    assert equal
    assert apart > 1e-2, "the two policies must differ for the test to mean anything"
    assert nbytes > 0


def test_what_is_frozen_is_not_kept_twice(tiny_dir: Path) -> None:
    batch = rl_batch(tiny_dir)
    sizes = [
        run_ranks(swapped, 1, str(tiny_dir), str(tiny_dir), batch, freeze)[0][3]
        for freeze in ((), ("vision", "merger"))
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("case", CASES)
def test_an_update_with_kl_does_not_depend_on_the_layout(tiny_dir: Path, reference_dir: Path, case: str) -> None:
    arguments = (str(tiny_dir), str(reference_dir), rl_batch(tiny_dir))
    one = run_ranks(update, 1, *arguments, {}, 4096, case)[0]
    assert one["kl"] is None or one["kl"] > 0
    for layout, max_tokens in LAYOUTS:
        world = Layout(**layout).world_size
        other = run_ranks(update, world, *arguments, layout, max_tokens, case)[0]
        assert compare(other, one) <= 1e-5  # measured 2.2e-6


def test_kl_moves_the_update(tiny_dir: Path, reference_dir: Path) -> None:
    batch = rl_batch(tiny_dir)
    with_kl = [run_ranks(update, 1, str(tiny_dir), str(reference_dir), batch, {}, 4096, case)[0] for case in CASES]
    pull = (with_kl[0]["steps"]["model.norm.weight"] - with_kl[1]["steps"]["model.norm.weight"]).abs().max()
    assert pull > 0.1 * with_kl[0]["steps"]["model.norm.weight"].abs().max()
