"""The helper other tests stand on: results by rank, failures with rank and traceback, a time limit, no leftovers."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankError, run_ranks


def _sum(rank: int, factor: float) -> float:
    value = torch.tensor(float(rank)) * factor
    dist.all_reduce(value)
    return float(value)


def _tensor(rank: int) -> torch.Tensor:
    print("hello from", rank)
    return torch.full((2,), rank)


def _gpus(rank: int) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _fail_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("the third weight")
    dist.barrier()


def _hang(rank: int, folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(f"{folder}/{rank}", "w") as handle:
        handle.write(f"{os.getpid()} {child.pid}")
    time.sleep(1000)


def _die(rank: int) -> None:
    if rank == 0:
        os._exit(7)


def _die_not(rank: int) -> None:
    pass


def test_results_come_back_by_rank():
    assert run_ranks(_sum, 3, 10.0) == [30.0] * 3


def test_tensors_and_prints_come_back(capsys):
    results = run_ranks(_tensor, 2)
    assert [result.tolist() for result in results] == [[0, 0], [1, 1]]
    assert "[rank 1] hello from 1" in capsys.readouterr().out


def test_gloo_ranks_see_no_gpu_so_that_they_do_the_same_on_a_gpu_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run_ranks(_gpus, 2) == ["", ""]


def test_a_failure_names_rank_and_traceback_and_does_not_wait_for_the_others():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2: KeyError") as raised:
        run_ranks(_fail_on_one, 2, timeout_seconds=500)
    assert "in _fail_on_one" in str(raised.value)
    assert time.monotonic() - start < 500


def test_a_dead_rank_is_named():
    with pytest.raises(RankError, match="rank 0 died without a word, exit code 7"):
        run_ranks(_die, 2)


def test_the_time_limit_kills_ranks_and_what_they_started(tmp_path):
    run_ranks(_die_not, 1)  # the server is up, so that the limit measures the ranks only
    with pytest.raises(RankError, match=r"ranks \[0, 1\] still running after 4 s"):
        run_ranks(_hang, 2, str(tmp_path), timeout_seconds=4)
    pids = [int(pid) for name in "01" for pid in (tmp_path / name).read_text().split()]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.05)
    assert [pid for pid in pids if _alive(pid)] == []


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
