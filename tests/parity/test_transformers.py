"""The native model against transformers at every layout: logits, loss, every gradient, unclipped norm, one SGD step, weights back.

Pictures of odd sizes, several a sample, and text-only samples are mixed in packed rows. Bars: 1e-5 relative (DESIGN). Measured maxima
over the grid below on two CPU cores: logits 7e-7, loss 1e-7, gradients 2.4e-6, gradient norm 5e-7, SGD step 2.4e-6.
"""

from pathlib import Path

import pytest

from eureka_megatron.models.qwen2_5_vl.tiny import build_tiny
from eureka_megatron.types import Sample
from eureka_megatron.verify import Job, made_up_samples, measure, write_reference
from tests.helpers.ranks import run_ranks

Reference = tuple[str, str, tuple[Sample, ...]]  # checkpoint, transformers' outputs, samples
LAYOUTS = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"data": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    {"tensor": 2, "sequence_parallel": True, "data": 2},
    {"pipeline": 2, "data": 2},
]


def rank_body(rank: int, job: Job) -> dict | None:
    return measure(rank, job, "env://")


def check(job: Job) -> None:
    report = run_ranks(rank_body, job.world_size, job)[0]
    print({name: f"{value:.1e}" for name, value in report["figures"].items()}, report["worst"])
    assert report["passed"], report


def name_of(layout: dict) -> str:
    return "-".join(f"{key[:2]}{int(value)}" for key, value in layout.items()) or "one-rank"


@pytest.fixture(scope="module")
def untied(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(tiny_dir, tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tied_tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(tied_tiny_dir, tmp_path_factory)


def reference_of(directory: Path, factory: pytest.TempPathFactory) -> Reference:
    reference, samples = factory.mktemp("reference") / "r.safetensors", made_up_samples(directory)
    write_reference(directory, reference, samples, grads=True)
    return str(directory), str(reference), tuple(samples)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_equals_transformers_at_every_layout(untied: Reference, layout: dict) -> None:
    check(Job(*untied, **layout))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=name_of)
def test_equals_transformers_with_tied_embeddings(tied: Reference, layout: dict) -> None:
    check(Job(*tied, **layout))


def test_does_not_depend_on_how_samples_are_packed(untied: Reference) -> None:
    """160 tokens hold one or two of the samples: several micro-batches instead of one."""
    check(Job(*untied, tensor=2, max_tokens=160))


@pytest.mark.parametrize(
    "shape",
    [
        {"text_heads": 6, "text_hidden": 192, "kv_heads": 2, "vision_depth": 3, "full_attention_blocks": (2,)},
        {"kv_heads": 1, "text_layers": 2, "window_size": 56},
        {"kv_heads": 4, "text_layers": 2, "vision_depth": 2, "full_attention_blocks": (0,), "ffn": 320},
    ],
    ids=["heads6-kv2", "kv1-window56", "kv4-full0"],
)
def test_equals_transformers_for_other_shapes(
    shape: dict, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = build_tiny(tmp_path / "hf", randomize_all=True, **shape)
    check(Job(*reference_of(directory, tmp_path_factory), tensor=2))


def test_a_wrong_weight_is_found(untied: Reference, tmp_path: Path) -> None:
    """The comparison itself must be able to fail: the reference of other weights is not met."""
    other = build_tiny(tmp_path / "hf", seed=1, randomize_all=True)
    report = run_ranks(rank_body, 1, Job(str(other), *untied[1:], grads=False))[0]
    assert not report["passed"]
    assert report["figures"]["logits"] > 1e-2
