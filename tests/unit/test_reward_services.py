"""Reward services that answer badly, over real sockets: asked again, told in one line, never passed on, never a crash."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eureka_megatron.errors import UserError
from eureka_megatron.rewards import RemoteReward, Rewarder, RewardRules

SAMPLES = [{"id": "a", "prompt": "p", "response": "r", "answer": "1", "length_tokens": 1}] * 2


def whole(body: str | bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length or len(data)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + data


BAD = {
    "cut": (whole('{"rewards": [1.0', length=500), "broke off|IncompleteRead"),
    "closed": (b"", "RemoteDisconnected"),
    "no status line": (b"hello\r\n\r\n", "BadStatusLine"),
    "headers without end": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, "more than 100 headers"),
    "empty": (whole(""), "JSONDecodeError"),
    "server error": (whole("{}", "503 Busy"), "HTTP Error 503"),
    "redirect in a circle": (whole("", "302 Found\r\nLocation: /"), "HTTPError|HTTP Error"),
    "page": (whole("<html>welcome</html>"), "JSONDecodeError"),
    "not text": (whole(b"\xff\xfe\x00"), "UnicodeDecodeError|JSONDecodeError"),
    "deep": (whole("[" * 100_000), "RecursionError"),
    "list": (whole("[1.0, 1.0]"), "object with 'rewards'"),
    "null": (whole('{"rewards": null}'), "'rewards'"),
    "null inside": (whole('{"rewards": [1.0, null]}'), "value 1 must be a finite number, got None"),
    "NaN": (whole('{"rewards": [NaN, 1.0]}'), "value 0 must be a finite number, got nan"),
    "Infinity": (whole('{"rewards": [1.0, -Infinity]}'), "got -inf"),
    "beyond a double": (whole('{"rewards": [1e999, 1.0]}'), "got inf"),
    "huge integer": (whole('{"rewards": [1' + "0" * 400 + ", 1.0]}"), "finite number"),
    "truth": (whole('{"rewards": [true, 1.0]}'), "got True"),
    "text": (whole('{"rewards": ["1.0", 1.0]}'), "got 1.0"),
    "nested": (whole('{"rewards": [[1.0], [1.0]]}'), "finite number"),
    "too few": (whole('{"rewards": [1.0]}'), "expected 2 values"),
    "one number": (whole('{"rewards": 1.0}'), "expected 2 values"),
    "accuracy of another length": (whole('{"rewards": [1.0, 1.0], "accuracy_rewards": [1.0]}'), "accuracy: expected 2"),
    "accuracy NaN": (whole('{"rewards": [1.0, 1.0], "accuracy_rewards": [NaN, 0]}'), "accuracy: value 0"),
}  # fmt: skip


@contextmanager
def service(answers: list[bytes]) -> Iterator[tuple[str, list[dict]]]:
    """A service that gives these raw answers one after the other, then good ones; yields its address and its requests."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            good = whole(json.dumps({"rewards": [1.0] * len(request["query"])}))
            self.wfile.write(answers[len(asked) - 1] if len(asked) <= len(answers) else good)
            self.close_connection = True

        def do_GET(self) -> None:  # where a redirect leads
            self.wfile.write(whole("", "302 Found\r\nLocation: /"))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/get_reward", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_asked_for_again(kind: str):
    with service([BAD[kind][0]]) as (url, asked):
        verdicts = RemoteReward(url, attempts=2, backoff_seconds=0.01).judge(SAMPLES)
    assert [verdict["total"] for verdict in verdicts] == [1.0, 1.0]
    assert len(asked) == 2


@pytest.mark.parametrize("kind", BAD)
def test_a_service_that_stays_bad_is_the_users_to_mend(kind: str):
    with (
        service([BAD[kind][0]]) as (url, _),
        Rewarder(RewardRules(urls=(url,), remote_attempts=1)) as rewarder,
        pytest.raises(UserError, match=BAD[kind][1]) as told,
    ):
        rewarder.judge(SAMPLES)
    assert url in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_an_answer_that_drips_or_never_ends_is_cut_off():
    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" ")
                    threading.Event().wait(0.05)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    remote = RemoteReward(f"http://127.0.0.1:{server.server_port}", attempts=1, timeout_seconds=0.5)
    with pytest.raises(RuntimeError, match="not whole within"):
        remote.judge(SAMPLES)
    server.shutdown()
    server.server_close()


def test_whatever_a_response_or_a_label_holds_the_request_is_json():
    odd = {**SAMPLES[0], "response": "cut \ud83d off\x00", "answer": [math.nan, {"a": math.inf}, 10**400]}
    with service([]) as (url, asked):
        RemoteReward(url).judge([odd])
    assert asked[0]["query"] == ["cut ? off\x00"]
    assert asked[0]["labels"] == [["nan", {"a": "inf"}, 10**400]]
