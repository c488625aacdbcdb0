"""Rewards from a service over HTTP, with the original's request and answer.

    POST {"query": [whole texts], "prompts": [prompts], "labels": [answers]}
    200  {"rewards": [totals], "accuracy_rewards": [...], "format_rewards": [...]}     the last two are optional

Several URLs share a batch in equal contiguous parts, as in the original; unlike there, a part whose service fails is
offered to the other services before anyone gives up. An answer counts only when it is whole and every value is a finite
number: whatever else comes back is a failure of that service.
"""

import asyncio
import json
import logging
import math
import reprlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from eureka_megatron.errors import ConfigError
from eureka_megatron.rewards.response import LARGEST_REWARD, Judged, Rewards, as_row

log = logging.getLogger(__name__)

_LARGEST_ANSWER_BYTES = 64 * 1024**2
_COMPONENTS = {"rewards": "total", "accuracy_rewards": "accuracy", "format_rewards": "format"}


class RemoteReward:
    """A reward service behind one or several URLs; `judge` takes what `JudgePool.judge` takes.

    Args:
        attempts: how often each URL is tried; waits of backoff_seconds, twice that, four times that … in between.
        timeout_seconds: for one request, from connecting to the last byte of its answer.
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
        wrong = [url for url in self.urls if not _is_web_address(url)]
        if not self.urls or wrong:
            raise ConfigError(
                f"rewards.urls needs http://host:port/path or https:// addresses, got {wrong or self.urls}"
            )
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.attempts, self.backoff_seconds, self.timeout_seconds = attempts, backoff_seconds, timeout_seconds

    def judge(self, samples: Sequence[Judged], **_: object) -> list[Rewards]:
        """Verdicts in the order of the samples: {"total", "accuracy"} and "format" when the service gives it.

        Accuracy, when the service gives none, is the total cut to [0, 1].

        Raises:
            RuntimeError: no URL answers; names every URL's last error.
        """
        rows = [as_row(sample) for sample in samples]
        part = -(-len(rows) // len(self.urls)) if rows else 1
        parts = [rows[start : start + part] for start in range(0, len(rows), part)]
        with ThreadPoolExecutor(max_workers=len(self.urls)) as threads:
            answers = list(threads.map(self._ask, parts, range(len(parts))))
        return [verdict for verdicts in answers for verdict in verdicts]

    def _ask(self, rows: list[dict[str, Any]], first_url: int) -> list[Rewards]:
        request = {
            "query": [row["query"] for row in rows],
            "prompts": [row["prompt"] for row in rows],
            "labels": [row["answer"] for row in rows],
        }
        body = json.dumps(_sendable(request), allow_nan=False).encode()
        errors: dict[str, str] = {}
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff_seconds * 2 ** (attempt - 1))
            for offset in range(len(self.urls)):
                url = self.urls[(first_url + offset) % len(self.urls)]
                try:
                    return _verdicts(self._post(url, body), len(rows))
                except Exception as error:  # of the network, TLS, HTTP, JSON, its values: a run outlives them all
                    errors[url] = " ".join(f"{type(error).__name__}: {error}".split())
                    log.warning("reward service %s: %s", url, errors[url])
        told = "; ".join(f"{url}: {error}" for url, error in errors.items())
        raise RuntimeError(f"no reward service answered in {self.attempts} attempts. {told}")

    def _post(self, url: str, body: bytes) -> Any:
        try:
            # A time-out of each read, as blocking clients have it, never ends an answer that drips.
            data = asyncio.run(asyncio.wait_for(_fetch(url, body), self.timeout_seconds))
        except TimeoutError as error:
            raise TimeoutError(f"no whole answer in {self.timeout_seconds:g} seconds") from error
        try:
            return json.loads(data, parse_int=float)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the answer must be a JSON object, got {data[:100]!r} ({error})") from error


async def _fetch(url: str, body: bytes) -> bytes:
    """The body of a 2xx answer to a POST."""
    import httpx  # here: judge workers import this package and need no client

    data = bytearray()
    headers = {"Content-Type": "application/json"}
    async with (
        httpx.AsyncClient(timeout=None) as client,
        client.stream("POST", url, content=body, headers=headers) as answer,
    ):
        if answer.is_redirect:
            raise ValueError(f"it redirects to {answer.headers.get('location')}; rewards.urls must name that address")
        async for piece in answer.aiter_bytes():
            data += piece
            if len(data) > _LARGEST_ANSWER_BYTES:
                raise ValueError(f"the answer must have at most {_LARGEST_ANSWER_BYTES} bytes")
    if not answer.is_success:
        raise ValueError(f"HTTP status {answer.status_code} instead of 200: {bytes(data[:200])!r}")
    return bytes(data)


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _sendable(value: Any) -> Any:
    """The value as any JSON parser takes it: without halves of surrogate pairs, and what is no number as text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_sendable(str(key)): _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _verdicts(answer: Any, expected: int) -> list[Rewards]:
    if not isinstance(answer, dict) or answer.get("rewards") is None:
        raise ValueError(f"the answer must be an object with 'rewards', got {reprlib.repr(answer)}")
    columns = {key: answer[key] for key in _COMPONENTS if answer.get(key) is not None}
    for key, values in columns.items():
        if not isinstance(values, list) or len(values) != expected:
            raise ValueError(f"{key!r}: expected {expected} values, got {reprlib.repr(values)}")
        for place, value in enumerate(values):
            if not isinstance(value, float) or not abs(value) <= LARGEST_REWARD:
                raise ValueError(f"{key!r}[{place}]: expected a finite number, got {reprlib.repr(value)}")
    names = [_COMPONENTS[key] for key in columns]
    verdicts = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{"accuracy": min(max(verdict["total"], 0.0), 1.0), **verdict} for verdict in verdicts]
