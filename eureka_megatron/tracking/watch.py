"""Says so when a run goes on without learning anything: every step skipped by the online filter, or rewards that never differ.

Such a run looks healthy: it samples, logs, ends with its steps done. What it has written are the weights it began with.
"""

from collections import Counter
from collections.abc import Mapping

from eureka_megatron.config import RunConfig

SAID_AT = (3, 30, 300, 3000)  # idle steps in a row: early, then sparingly
MOST = 0.9
COUNTED = ("filter/all_wrong", "filter/all_right", "filter/mixed")


class Watch:
    """Sees the metrics of every step of `eureka train`.

    Example:
        watch.after({"filter/skipped": 1.0, "filter/all_wrong": 4.0, …})    # for the third time in a row
        "nothing was learnt in the last 3 steps: 3 skipped, because …; no response to them was right: …"
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.all: Counter[str] = Counter()
        self.idle: Counter[str] = Counter()  # since the last step that taught something
        self.cut: Counter[str] = Counter()  # since the last step with responses of their own length

    def after(self, metrics: Mapping[str, float]) -> str | None:
        """A warning, when one is due after this step."""
        if "filter/skipped" not in metrics:  # no rollout step: an evaluation
            return None
        seen = Counter(_seen(metrics))
        self.all += seen
        self.idle = self.idle + seen if seen["skipped"] or seen["equal"] else Counter()
        self.cut = self.cut + seen if seen["cut"] else Counter()
        if self.idle["steps"] in SAID_AT:
            return f"nothing was learnt in the last {self.idle['steps']} steps: {self._why(self.idle)}"
        if self.cut["steps"] in SAID_AT and not self.idle:
            return f"in the last {self.cut['steps']} steps {self._cut_off()}"
        return None

    def at_end(self) -> list[str]:
        """Warnings about the run as a whole."""
        steps, idle = self.all["steps"], self.all["skipped"] + self.all["equal"]
        if idle and idle == steps:
            unchanged = (
                "the weights are those it began with" if self.all["skipped"] == steps else "the weights are no better"
            )
            return [f"no step trained, {unchanged}: {self._why(self.all)}"]
        if idle > steps / 2:
            return [f"nothing was learnt in {idle} of {steps} steps: {self._why(self.all)}"]
        if steps and self.all["cut"] == steps:
            return [f"in every step {self._cut_off()}"]
        return []

    def _why(self, seen: Mapping[str, int]) -> str:
        """What happened, the likeliest cause, and what to do."""
        rule, rollout = self.config.algorithm.filter, self.config.rollout
        parts = {
            "skipped": f"{seen['skipped']} skipped, because algorithm.filter ({rule.lower:g} <= accuracy <= {rule.upper:g}) left too few prompts",
            "equal": f"in {seen['equal']} all responses to a prompt earned the same, so that none is better than another",
        }
        happened = ", ".join(text for kind, text in parts.items() if seen[kind])
        if seen["cut"] > seen["steps"] / 2:
            return f"{happened}; {self._cut_off()}"
        right, others = seen["filter/all_right"], seen["filter/all_wrong"] + seen["filter/mixed"]
        if right > others:
            return f"{happened}; most prompts are answered right every time: take harder data"
        if not seen["earned"]:
            if self.config.rewards.function or self.config.rewards.urls:
                return f"{happened}; every response was given 0: look at rewards.function or rewards.urls"
            return (
                f"{happened}; no response earned any reward, neither for its answer nor for its form: ask for "
                "<think>…</think><answer>…</answer> (data.system_prompt), or teach it first by eureka sft"
            )
        if seen["filter/all_wrong"] > right + seen["filter/mixed"]:
            return f"{happened}; most prompts are never answered right: take easier data, or more rollout.samples_per_prompt"
        more = f"more rollout.samples_per_prompt (now {rollout.samples_per_prompt})"
        return f"{happened}; try {more}, a wider filter, or rewards that tell responses apart"

    def _cut_off(self) -> str:
        limit = self.config.rollout.max_response_tokens
        return (
            f"nearly all responses were cut off at rollout.max_response_tokens={limit}, before any answer: raise it, "
            "or teach the model to end by eureka sft"
        )


def _seen(metrics: Mapping[str, float]) -> dict[str, int]:
    """One step as counts. Example: {"steps": 1, "skipped": 0, "equal": 1, "cut": 0, "earned": 0, "filter/all_wrong": 4, …}."""
    return {
        "steps": 1,
        "skipped": int(metrics["filter/skipped"]),
        "equal": int(metrics.get("train/rewards_differ") == 0),
        "cut": int(metrics.get("rollout/truncated", 0.0) > MOST),
        "earned": int(metrics.get("rollout/reward", 0.0) != 0),
        **{name: int(metrics.get(name, 0)) for name in COUNTED},
    }
