"""The rewards of a run: rules, a user's function or a service, and the penalties that are added to any of them."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.rewards import Response, Rewarder, RewardRules, ScoringRules, score

RIGHT = "<think>2+2</think><answer>4</answer>"


def sample(response: str = RIGHT, **values: Any) -> dict[str, Any]:
    return {"id": "a", "prompt": "2+2?", "response": response, "answer": "4", "length_tokens": 12, **values}


def test_rules_judge_by_the_runs_options() -> None:
    with Rewarder(RewardRules(workers=1, options={"weights": {"format": 0.25}})) as rewarder:
        found = rewarder.judge([sample(), sample("5")])
    with Rewarder(RewardRules(workers=1, options=ScoringRules(weights={"format": 0.25}))) as rewarder:
        assert rewarder.judge([Response(**sample()), Response(**sample("5"))]) == found
    assert found[0] == score(RIGHT, "4", weights={"format": 0.25})
    assert found[1]["total"] == 0


def test_penalties_enter_the_total_but_not_the_accuracy() -> None:
    words = "<think>" + "so it goes " * 40 + "</think><answer>4</answer>"
    rules = RewardRules(
        workers=1, repetition=0.5, repetition_ngram=3, overlong_buffer_tokens=10, max_response_tokens=100
    )
    with Rewarder(rules) as rewarder:
        plain, long, repeated = rewarder.judge([sample(), sample(length_tokens=95), sample(words)])
    assert (plain["repetition"], plain["overlong"], plain["total"]) == (0, 0, 1.5)
    assert (long["overlong"], long["total"], long["accuracy"]) == (-0.5, 1.0, 1.0)
    assert -0.5 < repeated["repetition"] < -0.4
    assert repeated["total"] == pytest.approx(1.5 + repeated["repetition"])


def test_a_users_function_sees_the_whole_sample(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def judge(samples):\n"
        "    return [{'accuracy': float(s['id'] == 'a'), 'length': s['length_tokens'] / 100} for s in samples]\n"
    )
    with Rewarder(RewardRules(workers=1, function=f"{file}:judge")) as rewarder:
        first, second = rewarder.judge([sample(), sample(id="b", length_tokens=50)])
    assert first == {"accuracy": 1.0, "length": 0.12, "total": 1.12}
    assert second == {"accuracy": 0.0, "length": 0.5, "total": 0.5}


def test_a_part_given_to_some_answers_only_is_0_for_the_others(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def judge(samples):\n"
        "    (s,) = samples\n"
        "    return [{'accuracy': True, 'bonus': 0.5} if s['id'] == 'a' else {'accuracy': False}]\n"
    )
    with Rewarder(RewardRules(workers=1, function=f"{file}:judge")) as rewarder:
        first, second = rewarder.judge([sample(), sample(id="b")])
    assert first == {"accuracy": 1.0, "bonus": 0.5, "total": 1.5}
    assert second == {"accuracy": 0.0, "bonus": 0.0, "total": 0.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("judge", "must read package.module:function or path.py:function"),
        ("nowhere.py:judge", "there is no file nowhere.py"),
        ("no_such_package.rewards:judge", "there is no package 'no_such_package'"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rewarder(RewardRules(function=function))


def test_a_function_and_a_service_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.function and rewards\.urls are both set"):
        Rewarder(RewardRules(function="json:loads", urls=("http://127.0.0.1:1",)))


def test_a_function_that_always_fails_is_the_users_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def judge(samples):\n    return samples[0]['no such key']\n")
    told = r"rewards: the reward function failed on every one of 2 answers: .*broken\.py:2: KeyError: 'no such key'$"
    with Rewarder(RewardRules(workers=1, function=f"{file}:judge")) as rewarder:
        with pytest.raises(UserError, match=told):
            rewarder.judge([sample(), sample()])
        assert rewarder.timeouts == 2


@pytest.fixture
def service() -> Iterator[tuple[str, list[Any]]]:
    """A reward service on loopback that finds every second query right."""
    asked: list[Any] = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            totals = [float(number % 2) for number in range(len(request["query"]))]
            body = json.dumps({"rewards": totals, "accuracy_rewards": totals}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_service_judges_whole_texts_and_penalties_are_added_here(service: tuple[str, list[Any]]) -> None:
    url, asked = service
    rules = RewardRules(urls=(url,), overlong_buffer_tokens=10, max_response_tokens=100)
    with Rewarder(rules) as rewarder:
        first, second = rewarder.judge([sample(), sample(length_tokens=100)])
    assert asked[0] == {"query": ["2+2?" + RIGHT] * 2, "prompts": ["2+2?"] * 2, "labels": ["4", "4"]}
    assert first == {"accuracy": 0.0, "total": 0.0, "overlong": 0.0}
    assert second == {"accuracy": 1.0, "total": 0.0, "overlong": -1.0}


def test_a_service_that_is_not_there_is_named(service: tuple[str, list[Any]]) -> None:
    with (
        Rewarder(RewardRules(urls=("http://127.0.0.1:9",), remote_attempts=1)) as rewarder,
        pytest.raises(UserError, match=r"no reward service answered in 1 attempts\. http://127\.0\.0\.1:9"),
    ):
        rewarder.judge([sample()])
