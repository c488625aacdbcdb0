"""Videos in the native model against transformers, which is given vLLM's positions: logits, loss, every gradient, one SGD step.

Bars: 1e-5 relative (DESIGN). Measured maxima: logits 8.1e-7, loss 4e-8, gradients 7.6e-7, gradient norm 7e-8, SGD step 7.6e-7.
"""

from pathlib import Path

import pytest

from eureka_megatron.data.samples import training_sample
from eureka_megatron.verify import Job, Layout, measure, write_reference
from tests.helpers.ranks import run_ranks
from tests.helpers.videos import video_prompts


def rank_body(rank: int, job: Job) -> dict | None:
    return measure(rank, job, "env://")


@pytest.fixture(scope="module")
def reference(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("clips")
    samples = [
        training_sample(prompt, range(40 + n, 52 + n)) for n, prompt in enumerate(video_prompts(tiny_dir, folder))
    ]
    write_reference(tiny_dir, folder / "r.safetensors", samples, grads=True)
    return {
        "hf_dir": str(tiny_dir),
        "reference": str(folder / "r.safetensors"),
        "samples": tuple(samples),
        "grads": True,
    }


LAYOUTS = [
    {},
    {"tensor": 2, "sequence_parallel": True},
    {"tensor": 2, "vision_parallel": "data"},
    {"tensor": 2, "vision_parallel": "tensor"},
    {"pipeline": 2},
    {"context": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_native_equals_transformers(reference: dict, layout: dict) -> None:
    job = Job(**reference, layout=Layout(**layout))
    report = run_ranks(rank_body, job.layout.world_size, job)[0]
    print({name: f"{value:.1e}" for name, value in report["figures"].items()}, report["worst"])
    assert report["passed"], report
    assert report["begins"] is None, report["depths"]
