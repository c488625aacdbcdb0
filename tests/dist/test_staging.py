"""Copies of a rank's state go to ordinary host memory through one small buffer, bit for bit. (That it is pinned only a GPU can show.)"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eureka_megatron.checkpoint.store import checksum
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.train.checkpointing import Staging, TrainerCheckpoints, to_host
from tests.helpers.course import Course, course_samples, make_trainer, one_step
from tests.helpers.ranks import run_ranks

VALUES = [
    torch.randn(1000),
    torch.randn(3, 5, 7).bfloat16(),
    torch.arange(4096, dtype=torch.int64),
    torch.randn(1),
    torch.zeros(0, 4),
    torch.full((), float("nan")),
]


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 1 << 20])
def test_copies_are_bitwise_whatever_the_buffer_holds(nbytes: int) -> None:
    staging = Staging(nbytes)
    place = staging.buffer.data_ptr()
    for values in VALUES:
        host = to_host(values, staging)
        assert (host.dtype, host.shape) == (values.dtype, values.shape)
        assert torch.equal(host.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8))
        assert host.data_ptr() != values.data_ptr() or host.numel() == 0
        assert not host.is_pinned()
    assert (staging.buffer.data_ptr(), staging.buffer.nbytes) == (place, nbytes)  # one buffer, of this size, for all


def files_of_a_save(rank: int, course: Course, staging_bytes: int | None) -> dict[str, str]:
    trainer = make_trainer(rank, course)
    one_step(trainer, course, 0)
    checkpoints = TrainerCheckpoints(trainer, Path(course.folder))
    assert checkpoints.staging is None  # nothing to stage on a CPU
    checkpoints.staging = None if staging_bytes is None else Staging(staging_bytes)
    checkpoints.save(1)
    report = checkpoints.wait()
    assert report.error is None, report.error
    random = ("random.json", "checksums.b2")  # of processes that were not seeded; the second has the sum of the first
    return {path.name: checksum(path) for path in report.directory.iterdir() if path.name not in random}


def test_a_staged_save_writes_the_files_that_an_unstaged_one_writes(tiny_dir: Path, tmp_path: Path) -> None:
    course = Course(str(tiny_dir), course_samples(tiny_dir), "").at(2, tensor=2)
    course = replace(course, dtype="bfloat16")
    plain = run_ranks(files_of_a_save, 2, replace(course, folder=str(tmp_path / "plain")), None)[0]
    staged = run_ranks(files_of_a_save, 2, replace(course, folder=str(tmp_path / "staged")), 1000)[0]
    assert plain == staged
    assert sum(name.endswith(".distcp") for name in plain) == 2


def staging_on_a_gpu(rank: int, folder: str) -> int:
    parallel = replace(init_parallel(rank=rank, world_size=1), device=torch.device("cuda"))
    return TrainerCheckpoints(SimpleNamespace(parallel=parallel), Path(folder)).staging.buffer.nbytes


def test_on_a_gpu_the_buffer_is_small(tmp_path: Path) -> None:
    assert run_ranks(staging_on_a_gpu, 1, str(tmp_path)) == [64 << 20]
