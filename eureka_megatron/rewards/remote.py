"""Rewards from a service over HTTP, with the original's request and answer.

    POST {"query": [whole texts], "prompts": [prompts], "labels": [answers]}
    200  {"rewards": [totals], "accuracy_rewards": [...], "format_rewards": [...]}     the last two are optional

Several URLs share a batch in equal contiguous parts, as in the original; unlike there, a part whose service fails is
offered to the other services before anyone gives up. An answer that breaks off, is no JSON, or holds anything but one finite
number a query counts as a failure of the service: it is asked again, and told in the end, never passed on.
"""

import http.client
import json
import math
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MAX_BYTES = 64 << 20
_MAX_REWARD = 1e30  # squares of rewards stay finite in float32's range of means and deviations
_COMPONENTS = {"rewards": "total", "accuracy_rewards": "accuracy", "format_rewards": "format"}


class RemoteReward:
    """A reward service behind one or several URLs; `judge` takes what `JudgePool.judge` takes.

    attempts         how often each URL is tried; waits of backoff_seconds, twice that, four times that … in between
    timeout_seconds  for one request
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
        timeout_seconds: float = 180.0,
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if not self.urls or wrong:
            raise ValueError(f"a remote reward needs http:// or https:// URLs, got {wrong or self.urls}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.attempts, self.backoff_seconds, self.timeout_seconds = attempts, backoff_seconds, timeout_seconds

    def judge(self, samples: Sequence[Any], **_: Any) -> list[dict[str, float]]:
        """Verdicts in the order of the samples: {"total", "accuracy"} and "format" when the service gives it.

        samples: dictionaries with "query" (default: "response"), "prompt" and "answer", or (response, answer) pairs.
        Accuracy, when the service gives none, is the total cut to [0, 1]. Raises RuntimeError naming every URL's last
        error when none answers.
        """
        rows = [_row(sample) for sample in samples]
        part = -(-len(rows) // len(self.urls)) if rows else 1
        parts = [rows[start : start + part] for start in range(0, len(rows), part)]
        with ThreadPoolExecutor(max_workers=len(self.urls)) as threads:
            answers = list(threads.map(self._ask, parts, range(len(parts))))
        return [verdict for verdicts in answers for verdict in verdicts]

    def _ask(self, rows: list[dict[str, Any]], first_url: int) -> list[dict[str, float]]:
        request = {
            "query": [row["query"] for row in rows],
            "prompts": [row["prompt"] for row in rows],
            "labels": [row["answer"] for row in rows],
        }
        errors: dict[str, str] = {}
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff_seconds * 2 ** (attempt - 1))
            for offset in range(len(self.urls)):
                url = self.urls[(first_url + offset) % len(self.urls)]
                try:
                    return _verdicts(self._post(url, request), len(rows))
                # HTTP errors, refused connections, time-outs; broken protocol; no JSON, or JSON without finite rewards.
                except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                    errors[url] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        told = "; ".join(f"{url}: {error}" for url, error in errors.items())
        raise RuntimeError(f"no reward service answered in {self.attempts} attempts. {told}")

    def _post(self, url: str, request: dict[str, Any]) -> Any:
        body = json.dumps(_sendable(request), allow_nan=False).encode()
        message = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + self.timeout_seconds
        received = bytearray()
        with urllib.request.urlopen(message, timeout=self.timeout_seconds) as answer:
            while piece := answer.read1(1 << 16):
                received += piece
                if time.monotonic() > deadline:  # the time limit of a socket is that of one piece
                    raise TimeoutError(f"the answer was not whole within {self.timeout_seconds:g} s")
                if len(received) > _MAX_BYTES:
                    raise ValueError(f"the answer is longer than {_MAX_BYTES >> 20} MiB")
            if answer.length:  # what Content-Length promised and did not come
                raise ValueError(f"the answer broke off {answer.length} bytes before its end")
        return json.loads(received)


def _sendable(value: Any) -> Any:
    """The value as any JSON parser takes it: without halves of surrogate pairs, and what is no number as text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(key): _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(sample: Any) -> dict[str, Any]:
    if not isinstance(sample, dict):
        response, answer = sample
        sample = {"response": response, "answer": answer}
    query = sample["query"] if "query" in sample else sample["response"]
    return {"query": query, "prompt": sample.get("prompt", ""), "answer": sample["answer"]}


def _verdicts(answer: Any, expected: int) -> list[dict[str, float]]:
    if not isinstance(answer, dict) or answer.get("rewards") is None:
        raise ValueError(f"the answer must be an object with 'rewards', got {str(answer)[:200]}")
    columns = {name: answer[key] for key, name in _COMPONENTS.items() if answer.get(key) is not None}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != expected:
            raise ValueError(f"{name}: expected {expected} values, got {str(values)[:100]}")
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_REWARD:
                raise ValueError(f"{name}: value {index} must be a finite number, got {str(value)[:100]}")
    verdicts = [
        {name: float(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]
    return [{"accuracy": min(max(verdict["total"], 0.0), 1.0), **verdict} for verdict in verdicts]
