"""The rewards of a run: who judges (rules, a user's function, a service), and the penalties on length and repetition.

Rules and user functions run in judge processes with hard limits; a service has time-outs of its own. The penalties are plain arithmetic and
are added here, whoever judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.rewards.judge import JudgePool
from eureka_megatron.rewards.length import Penalties
from eureka_megatron.rewards.remote import RemoteReward
from eureka_megatron.rewards.response import Response, Rewards, as_row
from eureka_megatron.rewards.scoring import DEFAULT_WEIGHTS, ScoringRules


@dataclass(frozen=True, kw_only=True)
class RewardRules(Penalties):
    """How responses are judged; the penalties are added whoever judges.

    Attributes:
        options: how the rules score, or the fields of that by name.
        function: "package.module:function" or "path.py:function" to call instead of the rules; it gets a list with one dictionary
            {"id", "prompt", "response", "answer", "length_tokens"} and returns a list with one of numbers, "accuracy" among them
            (see rewards.worker). What it prints goes to the run's stderr.
        urls: reward services to ask instead (see rewards.remote).
    """

    options: ScoringRules | Mapping[str, Any] = field(default_factory=ScoringRules)
    workers: int = 2
    time_limit_seconds: float = 10.0
    function: str | None = None
    urls: tuple[str, ...] = ()
    remote_attempts: int = 5
    remote_timeout_seconds: float = 180.0
    max_response_tokens: int | None = 4096

    @property
    def scoring(self) -> ScoringRules:
        return self.options if isinstance(self.options, ScoringRules) else ScoringRules(**self.options)


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
        self._ask: Callable[[list[dict[str, Any]]], list[Rewards]]
        if rules.urls:
            self._ask = RemoteReward(
                rules.urls, attempts=rules.remote_attempts, timeout_seconds=rules.remote_timeout_seconds
            ).judge
        else:
            scoring = rules.scoring
            self._pool = JudgePool(
                rules.workers, time_limit_seconds=rules.time_limit_seconds, user_function=rules.function
            )
            self._ask = partial(self._pool.judge, rules=scoring)

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def timeouts(self) -> int:
        return 0 if self._pool is None else self._pool.timeouts

    def judge(self, samples: Sequence[Response | Mapping[str, Any]]) -> list[Rewards]:
        """Rewards by name, in order: "accuracy", "total" and what else there is, the same names for every sample.

        Raises:
            UserError: no service answers, or the user's function fails on every answer or cannot be loaded.
        """
        rows = [{**as_row(sample), "query": sample["prompt"] + sample["response"]} for sample in samples]
        try:
            verdicts = self._ask(rows)
        except RuntimeError as error:
            raise UserError(f"rewards: {error}") from error
        # A function may give a part to some answers only, one service of two its format.
        absent = dict.fromkeys((name for verdict in verdicts for name in verdict), 0.0)
        penalties, weights = self.rules.penalties, DEFAULT_WEIGHTS
        added = [penalties(row["response"], row.get("length_tokens"), weights) for row in rows]
        return [
            {**absent, **verdict, **extra, "total": verdict["total"] + sum(extra.values())}
            for verdict, extra in zip(verdicts, added, strict=True)
        ]
