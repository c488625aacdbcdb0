"""From prompts to the judged groups of one step: rollouts, rewards, online filter, dynamic sampling (ALGORITHMS, "Online filter").

Groups whose mean accuracy lies outside [lower, upper] carry no signal and are dropped before any log-probability is computed. Sampling goes
on until `prompts_per_step` groups are there or `max_generation_batches` is reached. Groups beyond what a step needs wait in a buffer
with their weight version; too old ones are dropped. The buffer is part of `state_dict`.

Knows nothing of Ray, vLLM or Megatron: the pool and the judge are arguments.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Unpack

import numpy as np
import torch

from eureka_megatron.config import RunConfig
from eureka_megatron.rewards import Response
from eureka_megatron.rewards.response import Rewards
from eureka_megatron.rl.filters import keep_groups, outcome_counts
from eureka_megatron.types import Group, Prompt, Sampling

log = logging.getLogger(__name__)

# Of prompts that an evaluation has in memory at once, for each engine: 40 pictures at the published bound. On their way to an engine
# they take about four times as much.
EVALUATION_BYTES = 64 * 1024 * 1024

_OUTCOMES = ("all_wrong", "mixed", "all_right")
Judge = Callable[[list[Response]], list[Rewards]]


class Generates(Protocol):
    """What the collector needs of a RolloutPool."""

    version: int

    def generate(
        self, prompts: Sequence[Prompt], *, seen: Counter[str] | None = None, **sampling: Unpack[Sampling]
    ) -> list[Group]: ...


class Stream(Protocol):
    """What the collector needs of a data.dataset.PromptStream."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class _Tally:
    """Counts of one `collect`, over everything sampled in it, kept or not."""

    batches: int = 0
    kept: int = 0
    rollouts: int = 0
    tokens: int = 0
    truncated: int = 0
    reward: float = 0.0  # sum of totals
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # sums of what totals are made of
    seconds_sampling: float = 0.0
    seconds_judging: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)  # all_wrong, mixed, all_right
    accuracies: list[float] = field(default_factory=list)  # mean of each group


def stream_seed(seed: int, name: str) -> int:
    """Of a stream of random numbers, by its name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) >> 2


class Collector:
    """Collects the groups of a step. `metrics` holds the figures of the last `collect`.

    Args:
        pool: a RolloutPool.
        judge: rewards of rollouts, in order, each with "accuracy" and what else is configured (rewards.Rewarder.judge).
        max_age: weight versions a buffered group may lie behind the current one before it is dropped.
    """

    def __init__(self, pool: Generates, judge: Judge, stream: Stream, config: RunConfig, *, max_age: int = 1) -> None:
        self.metrics: dict[str, float] = {}
        self._pool, self._judge, self._stream, self._config = pool, judge, stream, config
        self._max_age = max_age
        self._buffer: list[Group] = []
        self._one_at_a_time = threading.Lock()  # collect or evaluate: they may come from two threads

    def collect(self, step: int) -> list[Group]:
        """Up to `training.prompts_per_step` judged groups, oldest first; empty when fewer than `filter.min_groups` came together.

        An empty step is announced by a warning that names the filter; its groups stay in the buffer for the next one.
        """
        with self._one_at_a_time:
            return self._collect(step)

    def _collect(self, step: int) -> list[Group]:
        wanted, rule = self._config.training.prompts_per_step, self._config.algorithm.filter
        filtering = rule.enabled and step > rule.freezing_steps
        dropped = self._drop_old()
        reused = min(len(self._buffer), wanted)
        tally = _Tally()
        while len(self._buffer) < wanted and (tally.batches == 0 or filtering):
            if tally.batches == rule.max_generation_batches:
                break
            # Without a filter every group is kept, so no more is sampled than is missing.
            count = wanted if filtering else wanted - len(self._buffer)
            rollout = self._config.rollout
            sampling = self._sampling(f"{step}/{tally.batches}", rollout.samples_per_prompt, rollout.temperature, 1.0)
            groups = self._sample(self._stream.next(count), sampling, tally)
            self._buffer += self._filter(groups, tally, filtering)
        enough = min(rule.min_groups, wanted) if filtering else 1
        ready = self._buffer[:wanted] if len(self._buffer) >= enough else []
        if ready:
            # The original clears its buffer after each training step, surplus and all.
            self._buffer = [] if self._config.algorithm.compat == "mm_eureka" else self._buffer[wanted:]
        else:
            self._warn(step, tally)
        self.metrics = self._figures(tally, reused=reused, dropped=dropped, ready=len(ready))
        return ready

    def evaluate(self, prompts: Iterable[Prompt], n: int = 1) -> dict[str, float]:
        """Sample every prompt n times, as `training.evaluate_…` says, and judge: mean of each reward, "response_length", "truncated", "samples".

        Prompts are asked for, sampled and forgotten in parts, so memory does not grow with their number. The seed is the run's, and does
        not depend on the parts: two evaluations of equal weights give equal figures.
        """
        tally, rewards, seen, training = _Tally(), list[Rewards](), Counter[str](), self._config.training
        sampling = self._sampling("evaluate", n, training.evaluate_temperature, training.evaluate_top_p)
        with self._one_at_a_time:
            for part in self._parts(prompts):
                groups = self._sample(part, sampling, tally, seen)
                rewards += [rollout.rewards for group in groups for rollout in group.rollouts]
                del part, groups  # before the next ones are made
        if not rewards:
            return {"samples": 0.0}
        names = sorted(set().union(*rewards))
        return {name: float(np.mean([found[name] for found in rewards])) for name in names} | {
            "response_length": tally.tokens / len(rewards),
            "truncated": tally.truncated / len(rewards),
            "samples": float(len(rewards)),
        }

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the place in the prompt stream: what a resumed run needs to go on as if nothing had happened."""
        return {"buffer": list(self._buffer), "stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer = list(state["buffer"])
        self._stream.load_state_dict(state["stream"])

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _sampling(self, name: str, n: int, temperature: float, top_p: float) -> Sampling:
        """Each generation batch of each step, by its name, has a stream of random numbers of its own, the same in a resumed run."""
        seed, max_tokens = stream_seed(self._config.run.seed, name), self._config.rollout.max_response_tokens
        return Sampling(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, tally: _Tally, seen: Counter[str] | None = None
    ) -> list[Group]:
        """Rollouts of the prompts, judged. seen: how often ids have come up, when the prompts are a part of more."""
        start = time.perf_counter()
        groups = self._pool.generate(prompts, **sampling, seen=seen)
        sampled = time.perf_counter()
        responses = [
            Response(rollout.text, group.prompt.answer, group.prompt.id, group.prompt.text, len(rollout.tokens_R))
            for group in groups
            for rollout in group.rollouts
        ]
        verdicts = iter(self._judge(responses))
        judged = [
            replace(group, rollouts=tuple(replace(rollout, rewards=dict(next(verdicts))) for rollout in group.rollouts))
            for group in groups
        ]
        tally.batches += 1
        tally.seconds_sampling += sampled - start
        tally.seconds_judging += time.perf_counter() - sampled
        for rollout in (rollout for group in judged for rollout in group.rollouts):
            tally.rollouts += 1
            tally.tokens += len(rollout.tokens_R)
            tally.reward += rollout.rewards.get("total", 0.0)
            tally.truncated += rollout.finish_reason == "length"
            for name, value in rollout.rewards.items():
                tally.parts[name] += value
        return judged

    def _parts(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """The prompts without what only training needs, enough at a time to keep the engines busy."""
        rollout, part, held = self._config.rollout, list[Prompt](), 0
        most, most_bytes = 4 * rollout.max_concurrent * rollout.engines, EVALUATION_BYTES * rollout.engines
        for prompt in prompts:
            slim = prompt.without_patches()
            if part and (held + slim.nbytes > most_bytes or len(part) == most):
                yield part
                part, held = [], 0
            part.append(slim)
            held += slim.nbytes
        if part:
            yield part

    def _filter(self, groups: list[Group], tally: _Tally, filtering: bool) -> list[Group]:
        rule = self._config.algorithm.filter
        accuracy_GN = torch.tensor(np.array([group.rewards("accuracy") for group in groups]))
        tally.outcomes.update(outcome_counts(accuracy_GN))
        tally.accuracies += accuracy_GN.mean(dim=1).tolist()
        if filtering:
            compat = self._config.algorithm.compat
            kept_G = keep_groups(accuracy_GN, lower=rule.lower, upper=rule.upper, compat=compat).tolist()
            groups = [group for group, kept in zip(groups, kept_G, strict=True) if kept]
        tally.kept += len(groups)
        return groups

    def _drop_old(self) -> int:
        young = [g for g in self._buffer if self._pool.version - g.rollouts[0].weight_version <= self._max_age]
        dropped = len(self._buffer) - len(young)
        self._buffer = young
        return dropped

    def _warn(self, step: int, tally: _Tally) -> None:
        rule = self._config.algorithm.filter
        outcomes = ", ".join(f"{tally.outcomes[name]} {name.replace('_', ' ')}" for name in _OUTCOMES)
        log.warning(
            f"step {step} skipped: algorithm.filter ({rule.lower:g} <= accuracy <= {rule.upper:g}) left {len(self._buffer)} groups, "
            f"fewer than algorithm.filter.min_groups={rule.min_groups}, after {tally.batches} generation batches: {outcomes}"
        )

    def _figures(self, tally: _Tally, *, reused: int, dropped: int, ready: int) -> dict[str, float]:
        figures = {f"filter/{name}": float(tally.outcomes[name]) for name in _OUTCOMES} | {
            "filter/kept": float(tally.kept),
            "filter/from_buffer": float(reused),
            "filter/in_buffer": float(len(self._buffer)),
            "filter/dropped_old": float(dropped),
            "filter/skipped": float(ready == 0),
            "rollout/generation_batches": float(tally.batches),
            "rollout/groups": float(len(tally.accuracies)),
            "rollout/seconds": tally.seconds_sampling,
            "rollout/judge_seconds": tally.seconds_judging,
        }
        if tally.rollouts:  # all before the filter
            figures["train/accuracy_rewards_original"] = float(np.mean(tally.accuracies))
            figures["rollout/reward"] = tally.reward / tally.rollouts
            parts = {
                f"rewards/{name}": value / tally.rollouts for name, value in tally.parts.items() if name != "total"
            }
            figures |= parts
            figures["rollout/truncated"] = tally.truncated / tally.rollouts
            figures["rollout/tokens_per_second"] = tally.tokens / max(tally.seconds_sampling, 1e-9)
        return figures
