"""The judge pool: order, limits, replacement of workers, user functions, a remote service. Real processes throughout."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from eureka_megatron.rewards import JudgePool, RemoteReward, score
from tests.unit.malicious import pairs

NASTY = """
import os, sys, time

def reward(samples):
    (sample,) = samples
    text = sample["response"]
    print("noise on stdout")
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
    if text == "quit":
        sys.exit(1)
    if text == "overflow":
        return [{"accuracy": 1e308, "length": 1e308}]
    if text == "none":
        return [{"accuracy": None}]
    return [{"accuracy": 1.0, "length": len(text)}]

def wrong_shape(samples):
    return 1.0
"""
ZERO = {"accuracy": 0.0, "format": 0.0, "total": 0.0}


@pytest.fixture(scope="module")
def pool() -> Iterator[JudgePool]:
    with JudgePool(2) as pool:
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


@pytest.mark.parametrize("way", ["hang", "spin", "exit", "memory", "raise", "nan", "quit", "overflow", "none"])
def test_a_broken_judgement_costs_that_one_answer(nasty: str, way: str):
    """Whatever happens to one answer, the others are judged, also those in the same chunk."""
    with JudgePool(2, time_limit_seconds=1.0, memory_limit_bytes=2 * 1024**3, user_function=f"{nasty}:reward") as pool:
        texts = ["a", "bb", way, "ccc", "dddd", "eeeee"]
        started = time.monotonic()
        verdicts = pool.judge([(text, "gold") for text in texts])
        assert time.monotonic() - started < 10
        assert verdicts[2] == {"accuracy": 0.0, "length": 0.0, "total": 0.0}
        assert [v["length"] for v in verdicts] == [1.0, 2.0, 0.0, 3.0, 4.0, 5.0]
        assert [v["total"] for v in verdicts] == [2.0, 3.0, 0.0, 4.0, 5.0, 6.0]
        assert pool.timeouts == 1
        assert pool.judge([("a", "gold")])[0]["accuracy"] == 1.0  # and the pool goes on


def test_many_hangs_are_counted_each(nasty: str):
    with JudgePool(2, time_limit_seconds=0.3, user_function=f"{nasty}:reward") as pool:
        verdicts = pool.judge([("hang" if index % 4 == 0 else "a", "") for index in range(16)])
        assert [verdict["accuracy"] for verdict in verdicts] == [0.0, 1.0, 1.0, 1.0] * 4
        assert pool.timeouts == 4


def test_a_user_function_that_always_fails_raises_with_its_error(nasty: str):
    with (
        JudgePool(1, user_function=f"{nasty}:wrong_shape") as pool,
        pytest.raises(RuntimeError, match="one dictionary"),
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


def test_closing_leaves_no_process_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
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


class _Service(BaseHTTPRequestHandler):
    """Scores by length; answers the first `failures` requests with 500."""

    failures = 0
    requests: list[dict]
    answer = staticmethod(lambda request: {"rewards": [float(len(text)) for text in request["query"]]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(request)
        failed = type(self).failures > 0
        type(self).failures -= failed
        body = json.dumps(type(self).answer(request)).encode()
        self.send_response(500 if failed else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[_Service], str]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Handler", (_Service,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    server.server_close()


def test_a_remote_service_gets_the_originals_request_and_order_is_kept(service: tuple[type[_Service], str]):
    handler, url = service
    remote = RemoteReward([url, url + "2"], backoff_seconds=0.01)
    samples = [{"query": "q" * n, "prompt": f"p{n}", "response": "r", "answer": str(n)} for n in range(1, 6)]
    assert [verdict["total"] for verdict in remote.judge(samples)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(handler.requests) == 2
    assert all(set(request) == {"query", "prompts", "labels"} for request in handler.requests)
    assert sorted(label for request in handler.requests for label in request["labels"]) == ["1", "2", "3", "4", "5"]


def test_a_remote_service_is_retried_and_components_are_passed_on(service: tuple[type[_Service], str]):
    handler, url = service
    handler.failures = 2
    handler.answer = staticmethod(
        lambda request: {"rewards": [1.5, 0.5], "accuracy_rewards": [1.0, 0.0], "format_rewards": [0.5, 0.5]}
    )
    verdicts = RemoteReward(url, attempts=3, backoff_seconds=0.01).judge([("a", "1"), ("b", "2")])
    assert verdicts == [{"total": 1.5, "accuracy": 1.0, "format": 0.5}, {"total": 0.5, "accuracy": 0.0, "format": 0.5}]
    assert len(handler.requests) == 3


def test_another_url_takes_over_and_a_dead_or_odd_service_is_named(service: tuple[type[_Service], str]):
    handler, url = service
    dead = "http://127.0.0.1:9/get_reward"
    assert RemoteReward([dead, url], backoff_seconds=0.01).judge([("abc", "1")])[0]["total"] == 3.0
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9"):
        RemoteReward(dead, attempts=2, backoff_seconds=0.01).judge([("abc", "1")])
    handler.answer = staticmethod(lambda request: {"rewards": []})
    with pytest.raises(RuntimeError, match="expected 1 values"):
        RemoteReward(url, attempts=1).judge([("abc", "1")])
    with pytest.raises(ValueError, match="https://"):
        RemoteReward("file:///etc/passwd")
