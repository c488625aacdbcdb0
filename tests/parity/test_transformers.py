"""The native model against transformers at every layout: what leaves every module, logits, loss, gradients, norm, SGD step, weights back.

The grid is every way to use up to four ranks: TP 1/2/4 × PP 1/2/4 × CP × DP, each with and without sequence parallelism, a virtual pipeline and
the ways to share the vision tower; then uneven stages, tied embeddings, several micro-batches. Pictures of odd sizes, several a sample, and
text-only samples are mixed in packed rows. One model serves all: its key heads (2) are fewer than ranks at TP 4.

Bars: 1e-5 relative (DESIGN). Measured maxima over all 65 cells: logits 6e-7, loss 1.5e-7, gradients 4.4e-6 (of a key bias), gradient norm 7e-8,
SGD step 4.4e-6.
"""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.demo.forms import build_published
from eureka_megatron.types import Sample
from eureka_megatron.verify import Job, Layout, made_up_samples, measure, write_reference
from tests.helpers.ranks import run_ranks

RANKS = 4
SHAPE = {
    "text_hidden": 64,
    "text_layers": 8,  # two for each chunk of two stages with a virtual pipeline, one of four
    "ffn": 128,
    "vision_hidden": 64,
    "vision_depth": 3,
    "vision_ffn": 128,
    "full_attention_blocks": (1,),
}


def grid() -> Iterator[Layout]:
    for tensor, pipeline, context, data in product((1, 2, 4), repeat=4):
        if tensor * pipeline * context * data > RANKS:
            continue
        for virtual, sequence, vision in product(
            (1, 2) if pipeline > 1 else (1,),
            (False, True) if tensor > 1 else (False,),
            ("replicated", "data", "tensor") if tensor > 1 else ("replicated",),
        ):
            yield Layout(
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                data=data,
                sequence_parallel=sequence,
                vision_parallel=vision,
            )


UNEVEN = [
    Layout(pipeline=2, layers_first_stage=3),
    Layout(pipeline=2, layers_last_stage=1),
    Layout(pipeline=2, virtual_pipeline=2, layers_first_stage=2),
    Layout(pipeline=4, layers_first_stage=1, layers_last_stage=1),
    Layout(tensor=2, pipeline=2, sequence_parallel=True, layers_first_stage=1, vision_parallel="data"),
]
TIED = [
    Layout(),
    Layout(tensor=2, sequence_parallel=True),
    Layout(context=2),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(pipeline=4),
    Layout(pipeline=4, virtual_pipeline=2),
    Layout(tensor=2, pipeline=2, sequence_parallel=True),
    Layout(pipeline=2, context=2),
    Layout(pipeline=2, data=2),
]


@dataclass
class Cells:
    """Reports by layout. All layouts of one world size are measured by one set of processes, when the first is asked for."""

    directory: str
    reference: str
    samples: tuple[Sample, ...]
    layouts: list[Layout]
    reports: dict[Layout, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, layout: Layout) -> dict[str, Any]:
        if layout not in self.reports:
            alike = [other for other in self.layouts if other.world_size == layout.world_size]
            jobs = [self.job(other) for other in alike]
            with tempfile.TemporaryDirectory() as folder:
                reports = run_ranks(measure_all, layout.world_size, jobs, folder, timeout_seconds=1200)[0]
            self.reports |= zip(alike, reports, strict=True)
        return self.reports[layout]

    def job(self, layout: Layout) -> Job:
        # One or two samples a micro-batch where their number matters, else all in one row.
        longest = max(map(len, self.samples))
        max_tokens = longest + 16 if layout.pipeline * layout.data > 1 else 4096
        return Job(self.directory, self.reference, self.samples, layout, max_tokens=max_tokens)

    @property
    def worst(self) -> dict[str, float]:
        """Measured maxima over all layouts so far."""
        names = {name for report in self.reports.values() for name in report["figures"]}
        found = {n: max(report["figures"].get(n, 0.0) for report in self.reports.values()) for n in sorted(names)}
        return found | {"depths": max(max(report["depths"].values()) for report in self.reports.values())}

    def check(self, layout: Layout) -> None:
        report = self[layout]
        print(layout, {name: f"{value:.1e}" for name, value in report["figures"].items()}, report["worst"])
        assert report["passed"], report
        assert report["begins"] is None, report["depths"]


def measure_all(rank: int, jobs: list[Job], folder: str) -> list[dict[str, Any] | None]:
    reports = []
    gc.freeze()  # what is there already stays: collecting after every layout need not look at it
    for number, job in enumerate(jobs):
        leave_groups()
        try:
            reports.append(measure(rank, job, f"file://{folder}/{number}"))
        except Exception as error:
            raise RuntimeError(f"at layout: {job.layout}") from error
    return reports


def leave_groups() -> None:
    """Every layout has groups of its own; each that stays costs a thread, and Megatron makes fifty."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    gc.collect()  # models hold groups
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def cells(factory: pytest.TempPathFactory, layouts: list[Layout], **shape: Any) -> Iterator[Cells]:
    directory = build_published(factory.mktemp("tiny") / "hf", randomize_all=True, **shape)
    samples = made_up_samples(directory)
    reference = directory.parent / "reference"
    write_reference(directory, reference, samples, grads=True)
    found = Cells(str(directory), str(reference), tuple(samples), layouts)
    yield found
    print("maxima over", len(found.reports), "layouts:", {name: f"{value:.1e}" for name, value in found.worst.items()})


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    yield from cells(tmp_path_factory, [*grid(), *UNEVEN], **SHAPE)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    yield from cells(tmp_path_factory, TIED, tied=True, **SHAPE)


@pytest.mark.parametrize("layout", [*grid(), *UNEVEN], ids=str)
def test_equals_transformers_at_every_layout(untied: Cells, layout: Layout) -> None:
    untied.check(layout)


@pytest.mark.parametrize("layout", TIED, ids=str)
def test_equals_transformers_with_tied_embeddings(tied: Cells, layout: Layout) -> None:
    tied.check(layout)


def test_a_wrong_weight_is_found(untied: Cells, tmp_path: Path) -> None:
    """The comparison itself must be able to fail: the reference of other weights is not met."""
    other = build_published(tmp_path / "hf", seed=1, randomize_all=True, **SHAPE)
    job = Job(str(other), untied.reference, untied.samples, grads=False)
    report = run_ranks(measure_all, 1, [job], str(tmp_path))[0][0]
    assert not report["passed"]
    assert report["figures"]["logits"] > 1e-2
