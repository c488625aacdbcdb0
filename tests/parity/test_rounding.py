"""`eureka verify --dtype bfloat16`: the model as it trains is no further from fp32 than transformers' own bf16, and what is wrong shows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.cli.commands import main
from eureka_megatron.verify import Execution, Job, Layout, command, made_up_samples
from eureka_megatron.verify.rounding import FACTORS, PICTURES, measure_rounding, write_rounded_references
from tests.helpers.ranks import run_ranks

LAYOUTS = [
    Layout(),
    Layout(tensor=2, pipeline=2, sequence_parallel=True),
    Layout(tensor=2, sequence_parallel=True, vision_parallel="data", data=2),
    Layout(context=2, vision_parallel="tensor", tensor=2),
]


@pytest.fixture(scope="module", params=["flat, tied", "sharp"])
def job(
    request: pytest.FixtureRequest, tiny_dir: Path, tied_tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """Attention of random weights is nearly flat, and would hide what is wrong with it; sharp, it chooses as that of a trained model does."""
    folder = tmp_path_factory.mktemp("rounding")
    model = tied_tiny_dir if request.param == "flat, tied" else shutil.copytree(tiny_dir, folder / "hf")
    if request.param == "sharp":
        weights = load_file(model / "model.safetensors")
        for name, weight in weights.items():
            if "q_proj" in name or "k_proj" in name:
                weight *= 10
            elif "attn.qkv" in name:
                weight[: 2 * len(weight) // 3] *= 10
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    samples = tuple(made_up_samples(model, pictures=PICTURES))
    found = Job(
        str(model),
        str(folder / "exact"),
        samples,
        execution=Execution(dtype="bfloat16"),
        rounded=str(folder / "rounded"),
    )
    write_rounded_references(found)
    return found


def rank_body(rank: int, jobs: list[Job]) -> list[dict | None]:
    return [measure_rounding(rank, job, "env://") for job in jobs]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_model_that_trains_rounds_no_worse_than_transformers(job: Job, layout: Layout) -> None:
    report = run_ranks(rank_body, layout.world_size, [replace(job, layout=layout)])[0][0]
    for name, theirs in report["transformers"].items():
        ours, where = report["figures"][name], report["worst"].get(name, "")
        print(f"{name:<14} {ours:.1e} against {theirs:.1e}: {ours / theirs:.2f} times {where}")
    assert set(report["transformers"]) == set(FACTORS)
    assert report["figures"]["round_trip"] == 0
    assert report["begins"] is None
    assert report["passed"]
    # The figures are those of bf16: neither side is fp32 by mistake.
    for side in ("figures", "transformers"):
        assert 1e-3 < report[side]["logits"] < 5e-2  # measured 6e-3 (flat) and 1.6e-2


# ---- what must not pass ----------------------------------------------------------------------------------------------


def text_rotary_in_bf16() -> None:
    from eureka_megatron.models.qwen2_5_vl import model

    right = model.text_angles
    model.text_angles = lambda *arguments: right(*arguments).bfloat16().float()


def vision_rotary_in_bf16() -> None:
    from eureka_megatron.models.qwen2_5_vl import vision

    right = vision.vision_angles
    vision.vision_angles = lambda *arguments: right(*arguments).bfloat16().float()


def logits_rounded_to_fp8() -> None:
    from eureka_megatron.rl import logprobs
    from eureka_megatron.train import step

    right = logprobs.token_logprobs
    step.token_logprobs = lambda hidden, weight, *rest, **options: right(
        hidden, weight.to(torch.float8_e4m3fn).to(weight.dtype), *rest, **options
    )


BUGS = {
    text_rotary_in_bf16: ("model.layers.0.self_attn", {"worst_module", "gradients"}),
    vision_rotary_in_bf16: ("visual.blocks.0.attn", {"worst_module"}),
    logits_rounded_to_fp8: (None, {"logprobs"}),
}


def broken_rank(rank: int, job: Job, bug: Callable[[], None]) -> dict | None:
    bug()
    return measure_rounding(rank, job, "env://")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("job", ["sharp"], indirect=True)
def test_less_precision_than_transformers_is_seen(job: Job, bug: Callable[[], None]) -> None:
    begins, expected = BUGS[bug]
    report = run_ranks(broken_rank, 1, job, bug)[0]
    figures, bars = report["figures"], report["bars"]
    wrong = {name: figures[name] / bar for name, bar in bars.items() if figures[name] > bar}
    print({name: f"{value:.1f} times the bar" for name, value in wrong.items()}, report["begins"])
    assert not report["passed"]
    assert expected <= wrong.keys()
    assert report["begins"] == begins


@pytest.mark.parametrize("job", ["flat, tied"], indirect=True)
def test_a_wrong_weight_is_seen_where_it_stands(job: Job, tmp_path: Path) -> None:
    directory = shutil.copytree(job.hf_dir, tmp_path / "wrong")
    name, weights = "model.layers.2.mlp.up_proj.weight", load_file(directory / "model.safetensors")
    weights[name] += 0.05 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    report = run_ranks(rank_body, 1, [replace(job, hf_dir=str(directory), grads=False)])[0][0]
    assert report["begins"] == "model.layers.2"
    assert not report["passed"]


def broken_measure(rank: int, job: Job, address: str) -> dict | None:
    logits_rounded_to_fp8()
    return measure_rounding(rank, job, address)


def test_the_command_says_so_and_by_its_exit_code(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", "--hf", str(tiny_dir), "--dtype", "bfloat16"]
    assert main([*words, "--tp", "2", "--grads", "--json"]) == 0
    output = capsys.readouterr().out
    report = json.loads(output[output.index("{") :])
    assert report["dtype"] == "bfloat16"
    assert report["figures"].keys() == report["bars"].keys() == {*FACTORS, "round_trip"}
    monkeypatch.setattr(command, "measure_rounding", broken_measure)
    assert main(words) == 1
    output = capsys.readouterr().out
    assert any("logprobs" in line for line in output.splitlines() if "TOO LARGE" in line)
    assert output.rstrip().endswith("FAILED")
