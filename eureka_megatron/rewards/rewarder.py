"""The rewards of a run: who judges (rules, a user's function, a service), and the penalties on length and repetition.

Rules and user functions run in judge processes with hard limits; a service has time-outs of its own. The penalties are plain arithmetic and
are added here, whoever judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.rewards import length
from eureka_megatron.rewards.judge import JudgePool
from eureka_megatron.rewards.remote import RemoteReward


@dataclass(frozen=True)
class RewardRules:
    """How responses are judged.

    Attributes:
        options: keyword options of `rewards.score`, for the rules.
        function: "package.module:function" or "path.py:function" to call instead of the rules; it gets a list with one dictionary
            {"id", "prompt", "response", "answer", "length_tokens"} and returns a list with one of numbers, "accuracy" among them
            (see rewards.worker). What it prints goes to the run's stderr.
        urls: reward services to ask instead (see rewards.remote).
        repetition: largest penalty for repeated n-grams of `repetition_ngram` items (see rewards.length); 0: none.
        overlong_buffer_tokens: DAPO's penalty grows over the last so many tokens before `max_response_tokens`; 0: none.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 2
    time_limit_seconds: float = 10.0
    function: str | None = None
    urls: tuple[str, ...] = ()
    remote_attempts: int = 5
    remote_timeout_seconds: float = 180.0
    repetition: float = 0.0
    repetition_ngram: int = 20
    overlong_buffer_tokens: int = 0
    max_response_tokens: int = 4096


def check_function(path: str) -> None:
    """Refuse a `rewards.function` that cannot be found, without running the user's code. Raises ConfigError."""
    where, separator, name = path.rpartition(":")
    if not separator or not where or not name:
        raise ConfigError(f"rewards.function={path!r} must read package.module:function or path.py:function")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ConfigError(f"rewards.function={path!r}: there is no file {where}")
    elif find_spec(where.partition(".")[0]) is None:
        raise ConfigError(f"rewards.function={path!r}: there is no package {where.partition('.')[0]!r} to import")


class _Judge(Protocol):
    def judge(self, samples: Sequence[Any], **options: Any) -> list[dict[str, float]]: ...


class Rewarder:
    """A context manager: judge processes live as long as it does.

    `timeouts` counts the answers so far that got 0 because they broke a limit of time or memory, or the judge.
    """

    def __init__(self, rules: RewardRules) -> None:
        if rules.function and rules.urls:
            raise ConfigError("rewards.function and rewards.urls are both set; one of them judges")
        if rules.function:
            check_function(rules.function)
        self.rules = rules
        self._pool: JudgePool | None = None
        if rules.urls:
            self._judge: _Judge = RemoteReward(
                rules.urls, attempts=rules.remote_attempts, timeout_seconds=rules.remote_timeout_seconds
            )
        else:
            self._judge = self._pool = JudgePool(
                rules.workers, time_limit_seconds=rules.time_limit_seconds, user_function=rules.function
            )

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def timeouts(self) -> int:
        return 0 if self._pool is None else self._pool.timeouts

    def judge(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """Rewards by name, in order: "accuracy", "total" and what else there is, the same names for every sample.

        Args:
            samples: each with "id", "prompt" (its text), "response", "answer" and "length_tokens" (of the response).

        Raises:
            UserError: no service answers, or the user's function fails on every answer or cannot be loaded.
        """
        try:
            if self.rules.function or self.rules.urls:
                rows = [{**sample, "query": sample["prompt"] + sample["response"]} for sample in samples]
                verdicts = self._judge.judge(rows)
            else:
                pairs = [(sample["response"], sample["answer"]) for sample in samples]
                verdicts = self._judge.judge(pairs, **self.rules.options)
        except RuntimeError as error:
            raise UserError(f"rewards: {error}") from error
        names = [name for verdict in verdicts for name in verdict]
        absent = dict.fromkeys(
            names, 0.0
        )  # a function may give a part to some answers only, one service of two its format
        return [
            self._penalised({**absent, **verdict}, sample) for verdict, sample in zip(verdicts, samples, strict=True)
        ]

    def _penalised(self, verdict: dict[str, float], sample: Mapping[str, Any]) -> dict[str, float]:
        rules, penalties = self.rules, {}
        if rules.repetition:
            penalties["repetition"] = length.repetition_penalty(
                sample["response"], max_penalty=rules.repetition, ngram=rules.repetition_ngram
            )
        if rules.overlong_buffer_tokens:
            penalties["overlong"] = length.overlong_penalty(
                sample["length_tokens"],
                max_response_tokens=rules.max_response_tokens,
                buffer_tokens=rules.overlong_buffer_tokens,
            )
        return {**verdict, **penalties, "total": verdict["total"] + sum(penalties.values())}
