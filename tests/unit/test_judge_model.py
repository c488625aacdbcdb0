"""The judge model, behind a real server of ours: what is asked, kept, marked and counted; and what a silent address says."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation.judge_model import ATTEMPTS, JudgeModel, Question


class Server(ThreadingHTTPServer):
    asked: list[dict]
    reply = "Yes."
    status = 200


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(body | {"key": self.headers["Authorization"]})
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": self.server.reply},
            }
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
            data = json.dumps(answer if self.server.status == 200 else {"error": {"message": "no such model"}}).encode()
            self.send_response(self.server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def judge(server, tmp_path):
    return JudgeModel(f"http://127.0.0.1:{server.server_port}/v1", "judge", tmp_path / "judge.jsonl", workers=2)


def test_each_question_is_asked_once_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    questions = {
        1: Question("How far?", "0.5 m", "50 cm"),
        2: Question("How far?", "0.5 m", "50 cm"),
        3: Question("Who?", "x", "y"),
    }
    model = judge(server, tmp_path)
    assert model.ask(questions) == {1: True, 2: True, 3: True}
    assert (len(server.asked), model.asked, model.cached) == (2, 2, 0)
    assert server.asked[0]["key"] == "Bearer secret"
    assert server.asked[0]["temperature"] == 0
    assert "0.5 m" in server.asked[0]["messages"][0]["content"]
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "cut')
    server.reply = "no"
    again = judge(server, tmp_path)
    assert again.ask(questions) == {1: True, 2: True, 3: True}
    assert (len(server.asked), again.asked, again.cached) == (2, 0, 3)
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_what_is_neither_yes_nor_no_is_asked_again_and_then_left_open(server, tmp_path):
    server.reply = "It depends."
    model = judge(server, tmp_path)
    assert model.ask({1: Question("Who?", "x", "y")}) == {1: None}
    assert (len(server.asked), model.failed) == (ATTEMPTS, 1)
    assert [body["temperature"] for body in server.asked] == [0, 0.5, 1, 1.5, 2]


def test_an_address_that_refuses_is_told_in_one_line(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match=r"--judge-url http://127\.0\.0\.1.*no such model"):
        judge(server, tmp_path).ask({1: Question("Who?", "x", "y")})
