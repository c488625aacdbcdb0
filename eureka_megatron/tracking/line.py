"""A step in one line that a person can read: what came out of it and what it cost, each with its unit. What was not measured is left out."""

from collections.abc import Callable, Mapping

Metrics = Mapping[str, float]


def describe_step(metrics: Metrics) -> list[str]:
    """Example: ["reward 0.71 (accuracy 0.68, format 0.97)", "183 tokens a response (2 % cut)", "kept 14 of 16 groups", "engine gap 1e-07",
    "3.2 s (rollout 1.9, train 1.1, sync 0.1)"]; of a supervised step ["loss 0.52 a token", "learning rate 1e-05", "epoch 1.25", …].
    """
    return [text for part in PARTS if (text := part(metrics))]


def _reward(metrics: Metrics) -> str | None:
    """Of all responses where they are known, else of those trained on."""
    name = next((name for name in ("rollout/reward", "train/reward") if name in metrics), None)
    if name is None:
        return None
    parts = {key.removeprefix("rewards/"): value for key, value in metrics.items() if key.startswith("rewards/")}
    parts.pop("timeouts", None)
    listed = ", ".join(f"{part} {value:.2g}" for part, value in parts.items())
    return f"reward {metrics[name]:.3g}" + (f" ({listed})" if listed else "")


def _length(metrics: Metrics) -> str | None:
    if "train/response_length" not in metrics:
        return None
    cut = metrics.get("train/truncated", 0.0)
    return f"{metrics['train/response_length']:,.0f} tokens a response" + (f" ({cut:.0%} cut)" if cut else "")


def _groups(metrics: Metrics) -> str | None:
    if not metrics.get("rollout/groups"):
        return None
    text = f"kept {metrics.get('filter/kept', 0.0):.0f} of {metrics['rollout/groups']:.0f} groups"
    return text + (", too few: step skipped" if metrics.get("filter/skipped") else "")


def _loss(metrics: Metrics) -> str | None:
    return f"loss {metrics['sft/loss']:.3g} a token" if "sft/loss" in metrics else None


def _rate(metrics: Metrics) -> str | None:
    return f"learning rate {metrics['sft/actor_lr']:.2g}" if "sft/actor_lr" in metrics else None


def _epoch(metrics: Metrics) -> str | None:
    return f"epoch {metrics['sft/epoch']:.3g}" if "sft/epoch" in metrics else None


def _test(metrics: Metrics) -> str | None:
    return f"test accuracy {metrics['eval/accuracy']:.2g}" if "eval/accuracy" in metrics else None


def _gap(metrics: Metrics) -> str | None:
    gap = metrics.get("train/logprob_abs_diff_max")
    return f"engine gap {gap:.0e}" if gap is not None else None


def _speed(metrics: Metrics) -> str | None:
    speed = metrics.get("perf/tokens_per_second_per_rank")
    if speed is None:
        return None
    return f"{speed:,.0f} tokens/s a rank" + (f" ({metrics['perf/mfu']:.0%} MFU)" if "perf/mfu" in metrics else "")


def _seconds(metrics: Metrics) -> str | None:
    times = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    if not times:
        return None
    whole = f"{sum(times.values()):.1f} s"
    return whole + (f" ({', '.join(f'{name} {value:.1f}' for name, value in times.items())})" if len(times) > 1 else "")


PARTS: tuple[Callable[[Metrics], str | None], ...] = (
    _reward,
    _loss,
    _length,
    _groups,
    _test,
    _rate,
    _epoch,
    _gap,
    _speed,
    _seconds,
)
