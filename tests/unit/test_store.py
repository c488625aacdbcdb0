"""The folder of checkpoints: names, what is kept, what a killed run leaves, checksums that every byte of the list counts for."""

import subprocess
from pathlib import Path

import pytest

from eureka_megatron.checkpoint import store
from eureka_megatron.errors import UserError


def make(folder: Path, *steps: int) -> list[Path]:
    """Small checkpoints with valid checksums."""
    made = []
    for step in steps:
        temporary = folder / f"{store.directory_name(step)}.tmp"
        temporary.mkdir(parents=True)
        (temporary / "state.json").write_text(store.as_json({"format": 1, "step": step}))
        (temporary / "weights").write_bytes(bytes(range(256)) * step)
        checksums = {path.name: store.checksum(path) for path in temporary.iterdir()}
        store.write_through(temporary / store.CHECKSUMS_FILE, store.checksum_lines(checksums))
        made.append(folder / store.directory_name(step))
        store.commit(temporary, made[-1])
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "gone"),
    [
        ([10, 20, 30, 40, 50], 2, 20, [10, 30]),
        ([10, 20, 30], 1, 0, [10, 20]),
        ([10, 20, 30], 5, 0, []),
        ([], 1, 1, []),
        ([30, 10, 20], 1, 10, []),
    ],
)
def test_the_last_ones_and_every_mth_are_kept(steps: list, keep_last: int, keep_every: int, gone: list) -> None:
    assert store.surplus(steps, keep_last, keep_every) == gone


def test_pruning_deletes_the_surplus_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    (tmp_path / "notes.txt").write_text("mine")
    store.prune(tmp_path, keep_last=1, keep_every=2)
    assert names(tmp_path) == ["latest", "notes.txt", "step_000002", "step_000004"]
    assert (tmp_path / "latest").read_text() == "step_000004\n"


def test_what_a_killed_run_leaves_is_removed_and_never_counted(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "step_000002.tmp").mkdir()
    (tmp_path / "step_000000.deleting").mkdir()
    (tmp_path / "latest.tmp").write_text("")
    assert store.newest_whole(tmp_path) == (tmp_path / "step_000001", [])
    store.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["latest", "step_000001"]
    store.remove_unfinished(tmp_path / "absent")


def test_a_checkpoint_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    (directory,) = make(tmp_path, 7)
    (directory / "old").touch()
    make(tmp_path, 7)
    assert not (directory / "old").exists()
    assert store.problems_of(directory) == []


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    assert names(tmp_path)[-1] == "step_000003"
    moved = store.set_aside(tmp_path, 1)
    assert [path.name for path in moved] == ["step_000002.replaced", "step_000003.replaced"]
    assert store.list_checkpoints(tmp_path) == [(1, tmp_path / "step_000001")]
    make(tmp_path, 2)
    store.set_aside(tmp_path, 1)  # a second time over the first
    assert names(tmp_path) == ["latest", "step_000001", "step_000002.replaced", "step_000003.replaced"]


def test_no_folder_and_an_empty_one_mean_there_is_nothing(tmp_path: Path) -> None:
    assert store.newest_whole(tmp_path / "absent") == (None, [])
    assert store.newest_whole(tmp_path) == (None, [])


def test_every_damage_of_a_checkpoint_is_listed(tmp_path: Path) -> None:
    (directory,) = make(tmp_path, 5)
    (directory / "weights").write_bytes(b"?")
    (directory / "state.json").unlink()
    (directory / "more").mkdir()
    assert store.problems_of(directory) == [
        "state.json is missing",
        "more has no checksum",
        "weights does not match checksums.b2",
    ]


def test_every_bit_of_the_list_counts(tmp_path: Path) -> None:
    (directory,) = make(tmp_path, 1)
    path = directory / store.CHECKSUMS_FILE
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
            assert store.problems_of(directory), (place, bit)


def test_the_list_is_what_b2sum_reads(tmp_path: Path) -> None:
    (directory,) = make(tmp_path, 3)
    done = subprocess.run(["b2sum", "-c", store.CHECKSUMS_FILE], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"is no training checkpoint: it holds no state\.json"),
        ("{", r"state\.json cannot be read"),
        ("[]", r"state\.json cannot be read"),
        ('{"format": 2}', r"has format 2, this version reads 1"),
    ],
)
def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=message):
        store.read_state(tmp_path)
