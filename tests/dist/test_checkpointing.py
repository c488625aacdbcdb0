"""Training checkpoints on real ranks: bitwise continuation, other layouts, failures that leave the last good one."""

import os
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from eureka_megatron import cli
from eureka_megatron.checkpoint.store import checksum, checksum_lines, list_checkpoints, newest_whole, problems_of
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.listing import describe, differences
from eureka_megatron.weights.torch_dist import DistReader
from eureka_megatron.weights.torch_dist_metadata import STATE_PREFIX
from tests.helpers.course import Course, course_samples, make_trainer, one_step, run_course, weights_digest
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def plain(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(str(tiny_dir), course_samples(tiny_dir), str(tmp_path_factory.mktemp("course") / "checkpoints"))


CASES = {
    "tensor": (2, {"tensor": 2, "sequence_parallel": True}, {}),
    "virtual pipeline, frozen tower": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"freeze": ("vision", "merger")}),
    "data, bf16": (2, {}, {"dtype": "bfloat16"}),
    "sgd, bf16": (2, {"tensor": 2}, {"dtype": "bfloat16", "optimizer": "sgd"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_course_is_the_uninterrupted_one_bitwise(plain: Course, tmp_path: Path, case: str) -> None:
    world, layout, options = CASES[case]
    course = replace(plain.at(world, **layout), folder=str(tmp_path / "checkpoints"), **options)
    whole = run_ranks(run_course, world, course)
    resumed = run_ranks(run_course, world, course, str(tmp_path / "checkpoints" / "step_000002"))
    assert [rank["first"] for rank in resumed] == [2] * world
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == {step: before["losses"][step] for step in (2, 3)}
        assert after["weights"] == before["weights"]
        assert (before["errors"], after["errors"]) == ([None, None], [None])
    assert all(problems_of(directory) == [] for _, directory in list_checkpoints(tmp_path / "checkpoints"))


def pieces_of(rank: int, course: Course, source: str | None) -> tuple[list[float], str]:
    """Loads (or trains two steps), saves as step 2 of `course.folder`, then takes one more step. → its figures, digest after it"""
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    trainer = make_trainer(rank, course)
    checkpoints = TrainerCheckpoints(trainer, Path(course.folder))
    if source:
        checkpoints.load(Path(source))
    else:
        for step in range(2):
            one_step(trainer, course, step)
    checkpoints.save(2)
    report = checkpoints.wait()
    assert report.error is None, report.error
    return one_step(trainer, course, 2), weights_digest(trainer)


LAYOUTS = {
    "float32": [
        (1, {}, "replicated"),
        (4, {"tensor": 4}, "tensor"),
        (4, {"pipeline": 2, "virtual_pipeline": 2}, "replicated"),
    ],
    "bfloat16": [
        (4, {"tensor": 2, "sequence_parallel": True}, "data"),
        (2, {"pipeline": 2, "layers_first_stage": 1}, "replicated"),
        (4, {"context": 2}, "replicated"),
        (3, {}, "replicated"),
    ],
}


def everything(directory: Path, model: str, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """All tensors of a training checkpoint under HF names."""
    config, found = read_hf_config(model), {}
    for kind in ("", *kinds):
        reader = DistReader(directory, config, STATE_PREFIX.format(kind=kind) if kind else "")
        found |= {f"{kind} {name}": reader[name][:] for name in reader.tensors}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_means_the_same_at_every_layout(
    plain: Course, tied_tiny_dir: Path, tmp_path: Path, dtype: str
) -> None:
    """Each layout loads what the one before it saved, and saves it again: nothing of it changes, and training goes on alike."""
    kinds = ("exp_avg", "exp_avg_sq") + (("fp32_param",) if dtype == "bfloat16" else ())
    course = replace(plain, dtype=dtype, model=str(tied_tiny_dir))  # tied: the last stage holds a copy of the embedding
    source = expected = figures = None
    for number, (world, layout, vision) in enumerate(LAYOUTS[dtype]):
        course = replace(course.at(world, **layout, vision_parallel=vision), folder=str(tmp_path / str(number)))
        step, _ = run_ranks(pieces_of, world, course, source)[-1]
        source = str(Path(course.folder) / "step_000002")
        found = everything(Path(source), course.model, kinds)
        expected, figures = expected or found, figures or step
        assert found.keys() == expected.keys()
        different = [key for key in found if not torch.equal(found[key], expected[key])]
        assert different == []
        worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(step, figures, strict=True))
        print(f"{dtype}, {world} ranks {layout}: figures of the next step differ by {worst:.1e}")
        assert worst <= (1e-5 if dtype == "float32" else 1e-2)  # measured 1.0e-6 and 1.2e-3


@pytest.fixture(scope="module")
def saved(plain: Course) -> Course:
    """A finished course on two ranks, with checkpoints after steps 2 and 4."""
    course = plain.at(2, tensor=2)
    run_ranks(run_course, 2, course)
    return course


def test_a_flipped_byte_in_any_file_is_found_named_and_passed_over(saved: Course, tmp_path: Path) -> None:
    folder = shutil.copytree(saved.folder, tmp_path / "checkpoints")
    older, newest = (directory for _, directory in list_checkpoints(folder))
    assert newest_whole(folder) == (newest, [])
    files = sorted(path for path in newest.iterdir())
    assert {
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "state.json",
        "random.json",
        "checksums.b2",
        "config.json",
    } <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
            found, (warning,) = newest_whole(folder)
            assert found == older
            assert str(newest) in warning
            assert path.name in warning
        path.write_bytes(data)
    assert newest_whole(folder) == (newest, [])


@pytest.mark.parametrize("damage", ["truncated", "missing", "extra", "torn"])
def test_a_torn_checkpoint_is_passed_over(saved: Course, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(saved.folder, tmp_path / "checkpoints")
    older, newest = (directory for _, directory in list_checkpoints(folder))
    name = "__1_0.distcp"
    if damage == "truncated":
        os.truncate(newest / name, (newest / name).stat().st_size - 1)
    elif damage == "missing":
        (newest / name).unlink()
    elif damage == "extra":
        name = "surprise.distcp"
        (newest / name).write_bytes(b"?")
    else:
        name = "checksums.b2"
        (newest / name).unlink()
    found, (warning,) = newest_whole(folder)
    assert found == older
    assert f"{newest} is damaged ({name} " in warning
    shutil.rmtree(older)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole; move it away to start over"):
        newest_whole(folder)


def test_a_course_goes_on_from_the_checkpoint_before_the_damaged_one(saved: Course, tmp_path: Path) -> None:
    folder = shutil.copytree(saved.folder, tmp_path / "checkpoints")
    os.truncate(folder / "step_000004" / "__0_0.distcp", 999)
    course = replace(saved, folder=str(folder), steps=3)
    assert [rank["first"] for rank in run_ranks(run_course, 2, course, "auto")] == [2, 2]


def load_by_megatron(rank: int, course: Course, source: str) -> bool:
    """Weights by Megatron's own loader, into other ranks than those that saved: equal to ours?"""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from eureka_megatron.weights.online import sharded_state, unwrap

    trainer = make_trainer(rank, course)
    state, _, absent = dist_checkpointing.load(  # the second lists what is there besides: the optimizer's
        sharded_state(trainer.chunks, trainer.parallel), source, strict=StrictHandling.RETURN_ALL
    )
    unwrap(trainer.chunks[0]).load_state_dict(state, strict=False)
    assert not [key for key in absent if "_extra_state" not in key]
    reader = DistReader(source, trainer.hf_config)
    weights = [(name, tensor) for name, tensor in trainer.hf_weights() if tensor is not None]
    assert bool(weights) == (rank == 0)
    return all(torch.equal(tensor, reader[name][:].view(tensor.shape)) for name, tensor in weights)


def test_megatrons_own_loader_reads_the_weights(saved: Course) -> None:
    """Both ranks' shards are sent to the first, which compares."""
    assert run_ranks(load_by_megatron, 2, saved.at(2, pipeline=2), f"{saved.folder}/step_000004") == [True, True]


def test_a_training_checkpoint_is_described_compared_and_exported(
    saved: Course, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    older, newest = (directory for _, directory in list_checkpoints(Path(saved.folder)))
    assert cli.main(["convert", "inspect", str(newest)]) == 0
    text = capsys.readouterr().out
    assert "torch_dist, step 4, written by tensor 2 × pipeline 1 × context 1 × data 1" in text
    assert "optimizer.state.exp_avg_sq.lm_head.weight" in text
    assert cli.main(["convert", "inspect", str(newest), str(newest)]) == 0
    assert cli.main(["convert", "inspect", str(older), str(newest)]) == 1
    lines = capsys.readouterr().out
    assert "\nlm_head.weight: 51200 of 51200 values differ" in lines
    assert "optimizer.state.exp_avg.lm_head.weight: 51200 of 51200 values differ" in lines
    assert cli.main(["export", str(newest), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    left = differences(describe(newest), describe(tmp_path / "out"))
    assert all(line.startswith(f"only in {newest}: optimizer.state.exp_avg") for line in left), left[:3]
    assert len(left) == 2 * len(describe(tmp_path / "out").tensors)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    shutil.copytree(newest, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    assert cli.main(["export", str(tmp_path / "damaged"), "--output", str(tmp_path / "none")]) == 1
    assert "damaged is damaged: tokenizer.json does not match checksums.b2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def resume_and_look(rank: int, course: Course, trap: str) -> tuple[int, bool]:
    return run_course(rank, course, "auto")["first"], Path(trap).exists()


def test_nothing_in_a_checkpoint_is_unpickled(saved: Course, tmp_path: Path) -> None:
    """common.pt is there for Megatron's loader; what stands in it is never executed here."""
    newest = shutil.copytree(f"{saved.folder}/step_000004", tmp_path / "checkpoints" / "step_000004")
    trap = tmp_path / "trap"
    torch.save(Malicious(trap), newest / "common.pt")
    checksums = {path.name: checksum(path) for path in newest.iterdir() if path.name != "checksums.b2"}
    (newest / "checksums.b2").write_text(checksum_lines(checksums))
    course = replace(saved.at(1), folder=str(newest.parent))
    assert run_ranks(resume_and_look, 1, course, str(trap)) == [(4, False)]
    torch.load(newest / "common.pt", weights_only=False)
    assert trap.exists(), "the trap must work"


def saves_that_fail(rank: int, course: Course, where: str) -> dict[str, Any]:
    """Saves of steps 1 (well), 2 (full disk on rank 1), 3 (no permission), 4 (well again), training in between."""
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    trainer = make_trainer(rank, course)
    os.chdir(where)
    checkpoints = TrainerCheckpoints(trainer, Path("checkpoints"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    errors, entries = [], []

    def save(step: int) -> None:
        one_step(trainer, course, step)
        checkpoints.save(step)
        errors.append(checkpoints.wait().error)
        entries.append(sorted(path.name for path in Path("checkpoints").iterdir()))

    save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]) if rank == 1 else limits)
    save(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    for path, mode in ((".", 0o755), ("checkpoints", 0o555)):
        Path(path).chmod(mode)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: to root everything is permitted
    save(3)
    dist.barrier()
    os.seteuid(user)
    Path("checkpoints").chmod(0o755)
    dist.barrier()
    save(4)
    return {"errors": errors, "entries": entries}


def test_a_save_that_fails_leaves_the_last_good_one_and_says_why(plain: Course, tmp_path: Path) -> None:
    first, second = run_ranks(saves_that_fail, 2, plain.at(2), str(tmp_path))
    assert first == second, "all ranks hear of it"
    well, full, forbidden, again = first["errors"]
    assert (well, again) == (None, None)
    assert full == "checkpoints/step_000002.tmp/__1_0.distcp: File too large"
    assert forbidden == "checkpoints/step_000003.tmp: Permission denied"
    assert first["entries"][1] == first["entries"][2] == ["latest", "lock", "step_000001"]
    assert first["entries"][3] == ["latest", "lock", "step_000004"]  # keep_last is 1
    assert problems_of(tmp_path / "checkpoints" / "step_000004") == []


def save_while_training(rank: int, course: Course) -> tuple[str, str, bool]:
    """Trains on while the writing is held up. → digests of the weights when the save began, and of what it holds; whether it was held"""
    from eureka_megatron.checkpoint import writer
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    trainer = make_trainer(rank, course)
    one_step(trainer, course, 0)
    checkpoints, go, write = TrainerCheckpoints(trainer, Path(course.folder)), threading.Event(), writer._write_part
    writer._write_part = lambda path, share: go.wait() and write(path, share)
    before = weights_digest(trainer)
    checkpoints.save(1)
    one_step(trainer, course, 1)
    held = not checkpoints.ended and weights_digest(trainer) != before
    go.set()
    report = checkpoints.wait()
    assert report.error is None
    one_step(trainer, course, 2)
    checkpoints.load(report.directory)
    return before, weights_digest(trainer), held


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(plain: Course, tmp_path: Path) -> None:
    for before, found, held in run_ranks(save_while_training, 2, replace(plain.at(2), folder=str(tmp_path / "c"))):
        assert held
        assert found == before


def save_twice(rank: int, course: Course) -> list[str | None]:
    """Two runs at once into one folder."""
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    trainer = make_trainer(rank, course)
    errors = []
    for _ in range(2):
        checkpoints = TrainerCheckpoints(trainer, Path(course.folder))
        checkpoints.save(len(errors))
        errors.append(checkpoints.wait().error)
        trainer.checkpoints = checkpoints  # stays alive, with its lock
        course = replace(course, steps=course.steps + 1)
    return errors


def test_a_second_run_does_not_write_into_the_folder_of_the_first(plain: Course, tmp_path: Path) -> None:
    course = replace(plain.at(1), folder=str(tmp_path / "checkpoints"))
    ((first, second),) = run_ranks(save_twice, 1, course)
    assert first is None
    assert second == f"{course.folder}: another run saves its checkpoints here"
    assert [step for step, _ in list_checkpoints(Path(course.folder))] == [0]


def load_wrongly(rank: int, course: Course, source: str) -> str:
    from eureka_megatron.train.checkpointing import TrainerCheckpoints

    try:
        TrainerCheckpoints(make_trainer(rank, course), Path(course.folder)).load(Path(source))
    except UserError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_of_another_trainer_is_refused_on_all_ranks(saved: Course, tmp_path: Path) -> None:
    source = str(Path(saved.folder) / "step_000004")
    other = build_published(tmp_path / "other", seed=1, tied=True)
    expected = {
        "holds float32 weights, model.dtype is bfloat16": {"dtype": "bfloat16"},
        "was written with optimizer.name=adam, it is sgd now": {"optimizer": "sgd"},
        "lm_head.weight differs from the embedding it should be tied to": {"model": str(other)},
    }
    for message, change in expected.items():
        course = replace(saved.at(1), folder=str(tmp_path / "checkpoints"), **change)
        assert message in run_ranks(load_wrongly, 1, course, source)[0]
