"""`eureka verify` shows where a mismatch begins: one wrong weight, at every kind of layout."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.verify import Job, Layout, made_up_samples, measure, write_reference
from eureka_megatron.verify.command import describe
from tests.helpers.ranks import run_ranks

LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence_parallel=True, vision_parallel="data"),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(context=2),
    Layout(tensor=2, pipeline=2, sequence_parallel=True, vision_parallel="tensor"),
]
WRONG = {
    "visual.patch_embed": "visual.patch_embed.proj.weight",
    "visual.blocks.1": "visual.blocks.1.attn.proj.weight",
    "visual.merger": "visual.merger.mlp.2.bias",
    "model.layers.2": "model.layers.2.mlp.up_proj.weight",
    "lm_head": "lm_head.weight",
}


def rank_body(rank: int, jobs: list[Job]) -> list[dict | None]:
    return [measure(rank, job, "env://") for job in jobs]


@pytest.fixture(scope="module")
def jobs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """By the depth where it is wrong, a checkpoint with one other weight, against the reference of the right one."""
    folder, samples = tmp_path_factory.mktemp("wrong"), made_up_samples(tiny_dir)
    write_reference(tiny_dir, folder / "reference", samples, grads=False)
    found = {}
    for depth, name in WRONG.items():
        directory = shutil.copytree(tiny_dir, folder / depth)
        weights = load_file(directory / "model.safetensors")
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
        weights[name] = weights[name] + 0.05 * noise
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        found[depth] = Job(str(directory), str(folder / "reference"), tuple(samples), grads=False, max_tokens=160)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mismatch_begins_at_the_module_whose_weight_is_wrong(jobs: dict[str, Job], layout: Layout) -> None:
    asked = [replace(job, layout=layout) for job in jobs.values()]
    for depth, report in zip(jobs, run_ranks(rank_body, layout.world_size, asked)[0], strict=True):
        names = list(report["depths"])
        before = max([report["depths"][name] for name in names[: names.index(depth)]], default=0.0)
        print(f"{depth}: {before:.1e} before, {report['depths'][depth]:.1e} there")
        assert report["begins"] == depth
        assert not report["passed"]
        assert before <= 1e-5  # measured 1.9e-6 (sums over the 1176 values of a patch)
        assert report["depths"][depth] > 1e-3  # measured 9e-2 and more
        assert f"the difference begins at {depth}" in describe(
            report | {"against": "transformers", "layout": layout.model_dump()}
        )


def test_every_depth_is_reported_in_order(jobs: dict[str, Job]) -> None:
    report = run_ranks(rank_body, 1, [jobs["lm_head"]])[0][0]
    assert list(report["depths"]) == [
        "visual.patch_embed",
        *(f"visual.blocks.{number}" for number in range(4)),
        "visual.merger",
        "model.embed_tokens",
        *(f"model.layers.{number}" for number in range(4)),
        "model.norm",
        "lm_head",
    ]
