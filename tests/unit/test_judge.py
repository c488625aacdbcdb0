"""The judge pool: order, limits, replacement of workers, user functions. Real processes throughout."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eureka_megatron.rewards import JudgePool, score
from tests.unit.malicious import pairs

NASTY = """
from __future__ import annotations

import os, signal, subprocess, sys, time
from dataclasses import dataclass

@dataclass
class Looked:                       # needs its module to be registered
    up: str

def reward(samples):
    (sample,) = samples
    text = sample["response"]
    print("noise on stdout", text)
    if text == "much noise":
        print("x" * 200_000)
    if text == "half a pair":
        print("\\ud800")
    if text == "reads":
        assert sys.stdin.read() == ""
    if text == "own alarm":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    if text == "sys.exit":
        sys.exit("no more")
    if text == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        time.sleep(1000)
    if text == "hang":
        time.sleep(1000)
    if text == "spin":
        sum(range(10**12))          # inside C code, deaf to Python's signal handlers
    if text == "exit":
        os._exit(3)
    if text == "memory":
        return [{"accuracy": float(len(b"x" * (8 * 1024**3)))}]
    if text == "raise":
        raise ValueError("broken")
    if text == "nan":
        return [{"accuracy": float("nan")}]
    if text == "overflow":
        return [{"accuracy": 1e308, "length": 1e308}]
    if text == "none":
        return [{"accuracy": None}]
    return [{"accuracy": 1.0, "length": len(text)}]

def wrong_shape(samples):
    return 1.0

def leaves(samples):
    os._exit(3)

def sleeps(samples):
    time.sleep(1000)

def numbers(samples):
    import numpy as np
    import torch

    values = {"np": np.float32(0.5), "np int": np.int64(1), "np bool": np.True_, "torch": torch.tensor(0.5), "one": torch.ones(1),
              "bool": True, "int": 1, "None": None, "text": "1.0", "bytes": b"1", "inf": float("inf"), "huge": 10**400,
              "beyond float32": 1e30, "list": [1.0], "two": torch.ones(2), "np nan": np.float64("nan"), "complex": 1j}
    return [{"accuracy": values[samples[0]["response"]]}]

def shapes(samples):
    return {"none": None, "dict": {"accuracy": 1.0}, "empty": [], "two": [{"accuracy": 1.0}] * 2, "number": [1.0],
            "no accuracy": [{"total": 1.0}], "right": [{"accuracy": 1.0}]}[samples[0]["response"]]
"""
ZERO = {"accuracy": 0.0, "format": 0.0, "total": 0.0}


@pytest.fixture(scope="module")
def pool() -> Iterator[JudgePool]:
    with JudgePool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgePool]:
    file = tmp_path_factory.mktemp("numbers") / "nasty.py"
    file.write_text("import torch\n" + NASTY.replace("from __future__ import annotations", ""))
    with JudgePool(1, user_function=f"{file}:numbers") as pool:
        yield pool


@pytest.fixture
def nasty(tmp_path: Path) -> str:
    (tmp_path / "nasty.py").write_text(NASTY)
    return str(tmp_path / "nasty.py")


def test_verdicts_come_in_order_and_equal_those_of_score(pool: JudgePool):
    samples = [(f"<think>t</think><answer>{index}</answer>", str(index - index % 3)) for index in range(500)]
    assert pool.judge(samples) == [score(*sample) for sample in samples]
    assert pool.judge(samples[:3], compat="mm_eureka") == [score(*sample, compat="mm_eureka") for sample in samples[:3]]
    assert pool.judge([]) == []
    assert pool.timeouts == 0


def test_any_label_and_any_text_pass_through(pool: JudgePool):
    samples = [
        ("<answer>\ud800\x00é</answer>", {"a": [1, None]}),
        ("<answer>5</answer>", 5),
        ("<answer>x</answer>", ["5"]),
    ]
    assert [verdict["accuracy"] for verdict in pool.judge(samples)] == [0.0, 1.0, 0.0]
    assert pool.judge([("x" * 3_000_000, "1")] * 3) == [ZERO] * 3
    assert pool.timeouts == 0


def test_a_wrong_option_raises_instead_of_failing_every_answer(pool: JudgePool):
    with pytest.raises(ValueError, match="think must be"):
        pool.judge([("x", "1")], think="maybe")
    with pytest.raises(TypeError, match="thinking"):
        pool.judge([("x", "1")], thinking=True)


def test_threads_share_a_pool(pool: JudgePool):
    results: dict[int, list] = {}

    def work(number: int) -> None:
        results[number] = pool.judge([(f"<answer>{number}</answer>", str(number))] * 20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(verdict["accuracy"] == 1.0 for verdicts in results.values() for verdict in verdicts)


@pytest.mark.parametrize(
    "way", ["hang", "spin", "exit", "sys.exit", "memory", "raise", "nan", "overflow", "none", "child"]
)
def test_a_broken_judgement_costs_that_one_answer(nasty: str, way: str):
    """Whatever happens to one answer, the others are judged, also those in the same chunk."""
    with JudgePool(2, time_limit_seconds=1.0, memory_limit_bytes=2 * 1024**3, user_function=f"{nasty}:reward") as pool:
        texts = ["a", "bb", way, "ccc", "dddd", "eeeee"]
        verdicts = pool.judge([(text, "gold") for text in texts])
        assert verdicts[2] == {"accuracy": 0.0, "length": 0.0, "total": 0.0}
        assert [v["length"] for v in verdicts] == [1.0, 2.0, 0.0, 3.0, 4.0, 5.0]
        assert [v["total"] for v in verdicts] == [2.0, 3.0, 0.0, 4.0, 5.0, 6.0]
        assert pool.timeouts == 1
        assert pool.judge([("a", "gold")])[0]["accuracy"] == 1.0  # and the pool goes on


def test_what_a_function_prints_reads_or_does_to_signals_harms_nobody(nasty: str):
    """More output than a pipe holds, text that no terminal takes, the work's own pipe, a deaf ear for the alarm."""
    texts = ["much noise", "half a pair", "reads", "own alarm", "hang", "a"]
    with JudgePool(1, time_limit_seconds=2.0, user_function=f"{nasty}:reward") as pool:
        assert [v["accuracy"] for v in pool.judge([(text, "") for text in texts])] == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("value", "accuracy"),
    [("np", 0.5), ("np int", 1.0), ("np bool", 1.0), ("torch", 0.5), ("one", 1.0), ("bool", 1.0), ("int", 1.0)]
    + [(name, None) for name in ("None", "text", "bytes", "inf", "huge", "beyond float32", "list", "two", "np nan")]
    + [("complex", None)],
)
def test_a_number_is_what_float_takes_and_float32_can_square(numbers: JudgePool, value: str, accuracy: float | None):
    if accuracy is None:
        with pytest.raises(RuntimeError, match="'accuracy' must be a finite number, got"):
            numbers.judge([(value, "")])
    else:
        assert numbers.judge([(value, "")]) == [{"accuracy": accuracy, "total": accuracy}]


@pytest.mark.parametrize("shape", ["none", "dict", "empty", "two", "number", "no accuracy"])
def test_a_wrong_shape_costs_that_answer_and_is_logged(nasty: str, shape: str, caplog: pytest.LogCaptureFixture):
    with JudgePool(1, user_function=f"{nasty}:shapes") as pool, caplog.at_level(logging.WARNING):
        assert [v["accuracy"] for v in pool.judge([("right", ""), (shape, "")])] == [1.0, 0.0]
        assert pool.timeouts == 1
    (told,) = caplog.messages
    assert told.startswith("1 of 2 answers could not be judged and got 0: ")
    assert "a reward function" in told


@pytest.mark.parametrize(
    ("function", "reason"), [("leaves", "ended with exit code 3"), ("sleeps", "took longer than 0.3 seconds")]
)
def test_a_function_that_never_comes_back_is_told_too(nasty: str, function: str, reason: str):
    with (
        JudgePool(1, time_limit_seconds=0.3, user_function=f"{nasty}:{function}") as pool,
        pytest.raises(RuntimeError, match=f"failed on every one of 2 answers: .*{reason}"),
    ):
        pool.judge([("a", "b"), ("c", "d")])


def test_rules_that_break_a_limit_on_every_answer_do_not_end_a_run(caplog: pytest.LogCaptureFixture):
    with JudgePool(1, time_limit_seconds=1e-6) as pool, caplog.at_level(logging.WARNING):
        assert pool.judge([("<answer>1</answer>", "1")]) == [ZERO]
    assert caplog.messages == ["1 of 1 answers could not be judged and got 0: it took longer than 1e-06 seconds"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module\n", r"mine\.py:1: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("print('x' * 200_000)\nraise ValueError('two\\nlines')\n", r"mine\.py:2: ValueError: two lines$"),
        ("import sys\nsys.exit(4)\n", r"mine\.py:2: SystemExit: 4$"),
        ("def f(:\n", r"SyntaxError: .*mine\.py, line 1\)$"),
        ("import os\nos._exit(5)\n", "ended with exit code 5$"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path: Path, text: str, reason: str):
    (tmp_path / "mine.py").write_text(text)
    with (
        JudgePool(1, user_function=f"{tmp_path / 'mine.py'}:f") as pool,
        pytest.raises(RuntimeError, match=reason) as error,
    ):
        pool.judge([("a", "b")])
    assert "\n" not in str(error.value)


def test_many_hangs_are_counted_each(nasty: str):
    with JudgePool(2, time_limit_seconds=0.3, user_function=f"{nasty}:reward") as pool:
        verdicts = pool.judge([("hang" if index % 4 == 0 else "a", "") for index in range(16)])
        assert [verdict["accuracy"] for verdict in verdicts] == [0.0, 1.0, 1.0, 1.0] * 4
        assert pool.timeouts == 4


def test_a_user_function_that_always_fails_raises_with_its_error(nasty: str):
    with (
        JudgePool(1, user_function=f"{nasty}:wrong_shape") as pool,
        pytest.raises(RuntimeError, match=r"failed on every one of 2 answers: .*one dictionary"),
    ):
        pool.judge([("a", "b"), ("c", "d")])
    with JudgePool(1, user_function=f"{nasty}:reward") as pool, pytest.raises(RuntimeError, match="broken"):
        pool.judge([("raise", "b")])


@pytest.mark.parametrize(
    ("function", "message"),
    [("nowhere.py:f", "no such file"), ("json:nothing", "has no function"), ("reward", "module:function")],
)
def test_a_user_function_that_is_not_there_is_named(function: str, message: str):
    with JudgePool(1, user_function=function) as pool, pytest.raises(RuntimeError, match=message):
        pool.judge([("a", "b")])


def test_samples_may_be_records_for_a_user_function(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def f(samples):\n    return [{'accuracy': 1.0 if s['extra'] == 7 else 0.0} for s in samples]\n"
    )
    with JudgePool(1, user_function=f"{tmp_path / 'mine.py'}:f") as pool:
        verdicts = pool.judge([{"response": "r", "answer": "a", "extra": extra} for extra in (7, 8)])
    assert [verdict["accuracy"] for verdict in verdicts] == [1.0, 0.0]


def test_closing_leaves_no_process_behind(nasty: str):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with JudgePool(1, time_limit_seconds=2.0, user_function=f"{nasty}:reward") as pool:
        started: set[int] = set()
        judging = threading.Thread(target=pool.judge, args=([("a", ""), ("child", "")],))
        judging.start()
        while judging.is_alive():
            started |= {child.pid for child in psutil.Process().children(recursive=True)} - before
        started |= {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert len(started) >= 3  # a worker, what its function started, the next worker
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started)
    with JudgePool(2) as pool:
        pool.judge([("<answer>1</answer>", "1")])
        assert len({child.pid for child in psutil.Process().children(recursive=True)} - before) == 2
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    with pytest.raises(ValueError, match="closed"):
        pool.judge([("a", "b")])


@pytest.mark.slow
def test_ten_thousand_malicious_answers_do_no_harm():
    """No crash, no hang, bounded memory. Measured: 0 timeouts, 10 CPU-seconds of judging in all."""
    samples = list(pairs(10_000))
    with JudgePool(2, time_limit_seconds=5.0) as pool:
        workers = [psutil.Process(worker.process.pid) for worker in pool._workers]
        verdicts = pool.judge(samples)
        assert len(verdicts) == len(samples)
        assert all(set(verdict) == {"accuracy", "format", "total"} for verdict in verdicts)
        assert pool.timeouts <= 10  # a loaded machine may push a few answers over the limit
        assert all(worker.memory_info().rss < 1024**3 for worker in workers if worker.is_running())
        rewarded = [(response, gold) for (response, gold), v in zip(samples, verdicts, strict=True) if v["accuracy"]]
    # Right can only be who repeats the gold, or random text that happens to hold the value: a handful.
    assert len(rewarded) < len(samples) * 0.12
