"""The model on GPUs: fp32 against transformers, bf16 against fp32, recomputation, Transformer Engine against `local`, FP8.

Not yet run on hardware: whoever first does puts the measured maxima beside the bars.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Sample
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.measure import measure
from eureka_megatron.verify.reference import write_reference
from eureka_megatron.verify.samples import made_up_samples
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.gpu
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BACKEND = "nccl" if torch.cuda.is_available() else "gloo"
STEPS = 4


def on_ranks(body: Any, world: int, *arguments: Any) -> list[Any]:
    return run_ranks(body, world, *arguments, backend=BACKEND, timeout_seconds=500)


def verified(rank: int, job: Job) -> dict[str, Any] | None:
    return measure(rank, job, "env://")


def computed(rank: int, directory: str, samples: list[Sample], layout: dict, options: dict) -> dict[str, Any] | None:
    """Logits, gradients of the supervised loss, and the most memory that forward and backward took. → on rank 0."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    # Adam's distributed optimizer would leave each rank with its share of the reduced gradients.
    trainer = PolicyTrainer(directory, parallel, Execution(**options), optimizer=OptimizerSection(name="sgd"))
    logits = trainer.logits(samples)
    on_gpu = parallel.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    trainer.accumulate(samples)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    grads = {name: grad.cpu() for name, grad in trainer.hf_weights(select=lambda p: p.main_grad) if grad is not None}
    if rank:
        return None
    return {"logits": [value.cpu() for value in logits or []], "gradients": grads, "peak": peak}


def trained(rank: int, directory: str, samples: list[Sample], options: dict) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a few supervised steps."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(rank=rank, world_size=1)
    section = OptimizerSection(lr=1e-3, schedule="constant", warmup_ratio=0.0)
    trainer = PolicyTrainer(directory, parallel, Execution(**options), optimizer=section)
    trainer.start_phase(section, STEPS)
    history = [trainer.sft(samples) for _ in range(STEPS)]
    return [(metrics["loss"], metrics["grad_norm"]) for metrics in history]


def distance(found: dict[str, Any], exact: dict[str, Any]) -> tuple[float, float]:
    """Root mean square of the difference over that of the exact values: of logits and of gradients."""

    def relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        wrong = sum((a.double() - b.double()).square().sum() for a, b in pairs)
        return float((wrong / sum(b.double().square().sum() for _, b in pairs)).sqrt())

    logits = list(zip(found["logits"], exact["logits"], strict=True))
    gradients = [(found["gradients"][name], value) for name, value in exact["gradients"].items()]
    return relative(logits), relative(gradients)


@pytest.fixture(scope="module")
def samples(tiny_dir: Path) -> list[Sample]:
    return made_up_samples(tiny_dir)


@pytest.fixture(scope="module")
def exact(tiny_dir: Path, samples: list[Sample]) -> dict[str, Any]:
    """fp32 on one GPU."""
    return on_ranks(computed, 1, str(tiny_dir), samples, {}, {"dtype": "float32"})[0]


@pytest.fixture(scope="module")
def rounded(tiny_dir: Path, samples: list[Sample]) -> dict[str, Any]:
    """bf16, local, on one GPU."""
    return on_ranks(computed, 1, str(tiny_dir), samples, {}, {"dtype": "bfloat16"})[0]


def test_fp32_equals_transformers(tiny_dir: Path, samples: list[Sample], tmp_path: Path) -> None:
    write_reference(tiny_dir, tmp_path / "reference", samples, grads=True)
    report = on_ranks(verified, 1, Job(str(tiny_dir), str(tmp_path / "reference"), tuple(samples)))[0]
    print({name: f"{value:.1e}" for name, value in report["figures"].items()}, report["worst"])
    assert report["passed"], report


def test_bf16_follows_fp32(tiny_dir: Path, samples: list[Sample]) -> None:
    wide, narrow = (
        torch.tensor(on_ranks(trained, 1, str(tiny_dir), samples, {"dtype": dtype})[0])
        for dtype in ("float32", "bfloat16")
    )
    error = ((narrow - wide).abs() / wide).amax(0)
    print([f"{value:.1e}" for value in error.tolist()])
    assert error[0] <= 2e-3  # loss; on the CPU 3e-4
    assert error[1] <= 1e-2  # gradient norm; on the CPU 2e-3


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("backend", ["local", pytest.param("te", marks=needs_te)])
def test_recomputation(tiny_dir: Path, backend: str, recompute: str) -> None:
    """Flash attention's backward adds in no fixed order: gradients agree to bf16's rounding, not bitwise."""
    pictures = [((20, 20), (8, 30)), ((16, 24),)]
    many = made_up_samples(tiny_dir, pictures=pictures)
    options = {"dtype": "bfloat16", "backend": backend}
    plain, again = (
        on_ranks(computed, 1, str(tiny_dir), many, {}, {**options, "recompute": kind})[0]
        for kind in ("none", recompute)
    )
    _, gradients = distance(again, plain)
    print(f"gradients {gradients:.1e}, peak {plain['peak']} → {again['peak']} bytes")
    assert gradients <= 1e-2
    assert again["peak"] < plain["peak"] or recompute == "selective"  # flash attention itself keeps no scores


@needs_te
@pytest.mark.parametrize(
    "layout", [{}, pytest.param({"tensor": 2, "sequence_parallel": True}, marks=needs_two_gpus)], ids=["one", "tp2-sp"]
)
def test_transformer_engine_rounds_no_worse_than_local(
    tiny_dir: Path, samples: list[Sample], exact: dict[str, Any], rounded: dict[str, Any], layout: dict
) -> None:
    options = {"dtype": "bfloat16", "backend": "te"}
    found = on_ranks(computed, layout.get("tensor", 1), str(tiny_dir), samples, layout, options)[0]
    ours, local = distance(found, exact), distance(rounded, exact)
    print(f"te {ours}, local {local}")
    assert ours[0] <= 1.5 * local[0]
    assert ours[1] <= 1.5 * local[1]


@needs_te
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp8_learns(tiny_dir: Path, samples: list[Sample], recipe: str, recompute: str) -> None:
    from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support, check_fp8_support

    supported, reason = check_fp8_block_scaling_support() if recipe == "blockwise" else check_fp8_support()
    if not supported:
        pytest.skip(reason)
    options = {"dtype": "bfloat16", "backend": "te", "recompute": recompute}
    plain = torch.tensor(on_ranks(trained, 1, str(tiny_dir), samples, options)[0])
    narrow = on_ranks(trained, 1, str(tiny_dir), samples, options | {"fp8": "hybrid", "fp8_recipe": recipe})[0]
    error = ((torch.tensor(narrow) - plain).abs() / plain).amax(0)
    print(f"loss {error[0]:.1e}, gradient norm {error[1]:.1e}")
    assert error[0] <= 5e-2
    assert narrow[-1][0] < narrow[0][0]


@needs_two_gpus
@pytest.mark.parametrize(
    "layout", [{"tensor": 2, "sequence_parallel": True}, {"context": 2}, {"pipeline": 2}], ids=["tp2-sp", "cp2", "pp2"]
)
def test_two_gpus_equal_one(tiny_dir: Path, samples: list[Sample], exact: dict[str, Any], layout: dict) -> None:
    found = on_ranks(computed, 2, str(tiny_dir), samples, layout, {"dtype": "float32"})[0]
    if not found["logits"]:  # they stand on the last stage, the gradients on rank 0
        found["logits"] = exact["logits"]
    logits, gradients = distance(found, exact)
    print(f"logits {logits:.1e}, gradients {gradients:.1e}")
    assert logits <= 1e-5
    assert gradients <= 1e-5
