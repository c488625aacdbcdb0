"""Reward services over HTTP: order, retries, and every way of answering badly. Real sockets throughout."""

import json
import math
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.rewards import RemoteReward, Rewarder, RewardRules, remote


class _Service(BaseHTTPRequestHandler):
    """Scores by length; answers the first `failures` requests with 500."""

    failures = 0
    requests: list[dict]
    read = staticmethod(json.loads)
    answer = staticmethod(lambda request: {"rewards": [float(len(text)) for text in request["query"]]})

    def do_POST(self) -> None:
        request = type(self).read(self.rfile.read(int(self.headers["Content-Length"])))
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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
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


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "", "localhost:80/x", "http://", "http://a:b/", "http://a:99999/", "http://[::1/"]
)
def test_what_is_no_web_address_is_refused_at_once(url: str):
    with pytest.raises(ConfigError, match=r"rewards\.urls needs http://host:port/path"):
        Rewarder(RewardRules(urls=("http://127.0.0.1:1/r", url)))


def whole(body: bytes, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def rewards(text: str) -> bytes:
    return whole(b'{"rewards": %s}' % text.encode())


GOOD = rewards("[0.5, 1]")
NOT_FINITE = "expected a finite number, got "
BAD: dict[str, tuple[bytes, str]] = {
    "closed": (b"", "disconnected"),
    "cut in the body": (whole(b'{"rewards": [1.0', length=500), "received 16 bytes, expected 500"),
    "cut in a chunk": (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"rew', "incomplete chunked read"),
    "cut in a header": (b"HTTP/1.1 200 OK\r\nContent-Le", "disconnected"),
    "headers without end": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 50_000, "RemoteProtocolError"),
    "no HTTP": (b"garbage\r\n\r\n", "RemoteProtocolError"),
    "odd status": (b"HTTP/1.1 abc OK\r\n\r\n", "RemoteProtocolError"),
    "500": (whole(b"", "500 Internal Server Error"), "HTTP status 500 instead of 200"),
    "422 with its reason": (whole(b'{"detail": "no labels"}', "422 Unprocessable Entity"), "422 .*no labels"),
    "redirect": (whole(b"", "302 Found", "Location: http://elsewhere/r\r\n"), "redirects to http://elsewhere/r; "),
    "empty": (whole(b""), "must be a JSON object, got b''"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "must be a JSON object, got b''"),
    "page": (whole(b"<html>\n502</html>"), "must be a JSON object, got b'<html>"),
    "cut JSON": (whole(b'{"rewards": [1.0, 1.0'), "must be a JSON object"),
    "not text": (whole(b"\xff\xfe\x00"), "must be a JSON object"),
    "latin-1": (whole(b'{"rewards": [0.5, 1], "by": "Z\xfcrich"}'), "must be a JSON object"),
    "no gzip": (whole(b"abc", headers="Content-Encoding: gzip\r\n"), "DecodingError"),
    "very deep": (whole(b"[" * 100_000), "must be a JSON object"),
    "list": (whole(b"[0.5, 1]"), "must be an object with 'rewards'"),
    "other key": (whole(b'{"reward": [0.5, 1]}'), "must be an object with 'rewards'"),
    "null": (rewards("null"), "must be an object with 'rewards'"),
    "one number": (rewards("1.0"), r"'rewards': expected 2 values, got 1\.0"),
    "too few": (rewards("[1.0]"), "'rewards': expected 2 values"),
    "too many": (rewards("[1, 1, 1]"), "'rewards': expected 2 values"),
    "a null": (rewards("[1, null]"), r"'rewards'\[1\]: " + NOT_FINITE + "None"),
    "boolean": (rewards("[true, 1]"), NOT_FINITE + "True"),
    "text": (rewards('["0.5", 1]'), NOT_FINITE + "'0.5'"),
    "nested": (rewards("[[0.5], [1]]"), NOT_FINITE + r"\[0\.5\]"),
    "nested very deep": (rewards("[1, " + "[" * 500 + "]" * 500 + "]"), NOT_FINITE),
    "NaN": (rewards("[NaN, 1]"), NOT_FINITE + "nan"),
    "infinity": (rewards("[1, -Infinity]"), NOT_FINITE + "-inf"),
    "overflow": (rewards("[1e999, 1]"), NOT_FINITE + "inf"),
    "long whole number": (rewards("[1" + "0" * 5000 + ", 1]"), NOT_FINITE + "inf"),
    "beyond float32": (rewards("[1e39, 1]"), NOT_FINITE),
    "a part": (whole(b'{"rewards": [1, 1], "accuracy_rewards": [1, NaN]}'), r"'accuracy_rewards'\[1\]: " + NOT_FINITE),
    "a short part": (whole(b'{"rewards": [1, 1], "format_rewards": []}'), "'format_rewards': expected 2 values"),
}


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[Any]], str]]:
    """A function that starts a service which sends these answers, the last one for ever, → its URL.

    An answer is the bytes of it, or bytes that are sent before and bytes that are then repeated as long as somebody listens.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_LARGEST_ANSWER_BYTES", 1_000_000)
    servers = []

    def start(answers: list[Any]) -> str:
        class Service(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                header = b"".join(iter(self.rfile.readline, b"\r\n")).lower()
                self.rfile.read(int(header.split(b"content-length:")[1].split()[0]))
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    return
                self.wfile.write(answer[0])
                while not stop.wait(0 if len(answer[1]) > 1 else 0.01):
                    self.wfile.write(answer[1])

        stop = threading.Event()
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Service)
        server.handle_error = lambda *_: None  # the client hangs up on it
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append((server, stop))
        return f"http://127.0.0.1:{server.server_address[1]}/r"

    yield start
    for server, stop in servers:
        stop.set()
        server.shutdown()
        server.server_close()


def sample(**values: Any) -> dict[str, Any]:
    return {"id": "a", "prompt": "p", "response": "r", "answer": "1", "length_tokens": 1, **values}


@pytest.mark.parametrize("way", BAD)
def test_a_bad_answer_is_asked_for_again(raw: Callable[[list[Any]], str], way: str):
    once = raw([BAD[way][0], GOOD])
    expected = [{"total": 0.5, "accuracy": 0.5}, {"total": 1.0, "accuracy": 1.0}]
    assert RemoteReward(once, attempts=2, backoff_seconds=0.0).judge([sample()] * 2) == expected


@pytest.mark.parametrize("way", BAD)
def test_a_service_that_answers_badly_for_ever_is_one_line(raw: Callable[[list[Any]], str], way: str):
    answer, message = BAD[way]
    url = raw([answer])
    with (
        Rewarder(RewardRules(urls=(url,), remote_attempts=1)) as rewarder,
        pytest.raises(
            UserError, match=rf"rewards: no reward service answered in 1 attempts\. {url}: .*{message}"
        ) as error,
    ):
        rewarder.judge([sample()] * 2)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("start", "again", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x", "no whole answer in 0.5 seconds"),
        (b"HTTP/1.1 200 OK\r\n\r\n{", b" ", "no whole answer in 0.5 seconds"),
        (b"HTTP/1.1 200 OK\r\n\r\n[", b"1," * 10_000, "at most 1000000 bytes"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 10_000, "RemoteProtocolError"),
    ],
)
def test_drops_and_floods_come_to_an_end(raw: Callable[[list[Any]], str], start: bytes, again: bytes, message: str):
    url = raw([(start, again)])
    with pytest.raises(RuntimeError, match=message):
        RemoteReward(url, attempts=1, timeout_seconds=0.5 if len(again) == 1 else 60.0).judge([sample()])


def test_the_second_service_stands_in_for_the_first(raw: Callable[[list[Any]], str], caplog: pytest.LogCaptureFixture):
    bad, good = raw([rewards("[NaN]")]), raw([rewards("[0.25]")])
    verdicts = RemoteReward([bad, good], attempts=1).judge([sample()] * 2)
    assert [verdict["total"] for verdict in verdicts] == [0.25, 0.25]
    assert [message.partition(": ")[0] for message in caplog.messages] == [f"reward service {bad}"]


def test_a_service_gets_json_that_every_parser_takes(service: tuple[type[_Service], str]):
    handler, url = service
    handler.read = staticmethod(lambda body: (body.decode("utf-8"), json.loads(body, parse_constant=pytest.fail))[1])
    label = {"low": -math.inf, "half \ud83d": ["\udfff", math.nan, 1.5, None, True, 10**400]}
    RemoteReward(url, attempts=1).judge([sample(query="a\ud800b 😀 é\0", answer=label)])
    (request,) = handler.requests
    assert request["query"] == ["a?b 😀 é\0"]
    assert request["labels"] == [{"low": "-inf", "half ?": ["?", "nan", 1.5, None, True, 10**400]}]


def test_parts_that_one_of_two_services_gives_are_there_for_every_sample(raw: Callable[[list[Any]], str]):
    urls = raw([whole(b'{"rewards": [1], "format_rewards": [0.5]}')]), raw([rewards("[1]")])
    with Rewarder(RewardRules(urls=urls, remote_attempts=1)) as rewarder:
        first, second = rewarder.judge([sample(), sample()])
    assert first == {"accuracy": 1.0, "format": 0.5, "total": 1.0}
    assert second == {"accuracy": 1.0, "format": 0.0, "total": 1.0}
