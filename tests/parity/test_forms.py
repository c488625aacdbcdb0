"""Every published form of checkpoint computes what transformers computes from it, at TP 2 · PP 2 with sequence parallelism; gradients too."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as quiet

from eureka_megatron.demo.forms import FORMS, build_published
from eureka_megatron.verify import Job, Layout, made_up_samples, measure, write_reference
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow
TIED = {"transformers-4.49", "transformers-4.53", "transformers-5"}


def sweep(rank: int, folder: str) -> dict[str, Any]:
    """The ranks share out the references, then measure together."""
    quiet.disable_progress_bar()
    directories = {form: Path(folder) / form for form in FORMS}
    if rank == 0:
        for form, directory in directories.items():
            build_published(directory, form, tied=form in TIED, randomize_all=True)
    torch.distributed.barrier()
    for directory in [*directories.values()][rank::4]:
        write_reference(directory, directory / "reference", made_up_samples(directory), grads=True)
    torch.distributed.barrier()
    return {form: measure(rank, job_of(directory), "env://") for form, directory in directories.items()}


def job_of(directory: Path) -> Job:
    layout = Layout(tensor=2, pipeline=2, sequence_parallel=True)
    return Job(str(directory), str(directory / "reference"), tuple(made_up_samples(directory)), layout)


def test_every_form_equals_transformers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        everywhere = run_ranks(sweep, 4, folder, timeout_seconds=600)
    reports = {form: next(one[form] for one in everywhere if one[form] is not None) for form in FORMS}
    for form, report in reports.items():
        print(form, {name: f"{value:.1e}" for name, value in report["figures"].items()})
    failed = {form: (report["figures"], report["worst"]) for form, report in reports.items() if not report["passed"]}
    assert not failed, failed
