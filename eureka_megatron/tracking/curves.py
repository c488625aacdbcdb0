"""One picture of a run from its metrics.jsonl: what rose, what it cost, and whether trainer and engine agree.

Raw values are drawn faint, their running mean strong. A panel whose metrics were never logged is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eureka_megatron.errors import UserError
from eureka_megatron.tracking.tracker import read_metrics

INK, GRID = "#1f2933", "#d9e2ec"
COLOURS = ("#1769aa", "#d9480f", "#2b8a3e", "#862e9c", "#5c677d", "#c2255c", "#0b7285", "#e8890c")
WIDTH, ROW_HEIGHT = 6.2, 3.3  # inches of one panel
HEAD = 0.9  # inches for the title
RAW_ALPHA = 0.28
LABELS = {
    "train/accuracy_rewards": "groups trained on",
    "train/accuracy_rewards_original": "all rollouts, before the filter",
    "rollout/reward": "all rollouts, before the filter",
    "train/reward": "groups trained on",
    "train/format_rewards": "of these: format",
    "train/logprob_abs_diff_max": "largest of a step",
    "mismatch/tail": "99th percentile",
    "mismatch/text": "mean, text",
    "mismatch/pictures": "mean, with pictures",
    "train/response_length": "all",
    "train/correct_response_length": "correct",
    "train/wrong_response_length": "wrong",
    "eval/accuracy": "unseen test set",
}


# Steps and values by metric.
Series = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Section:
    """One panel. `names` are metric names or patterns (`time/*`) of the lines of one stage.

    stacked: areas on top of each other, for parts of a whole. share: an axis from 0 to 1.
    """

    title: str
    names: tuple[str, ...]
    ylabel: str = ""
    log: bool = False
    stacked: bool = False
    share: bool = False
    xlabel: str = "step"
    stage: str = "train"


SECTIONS = (
    Section(
        "Accuracy", ("train/accuracy_rewards_original", "train/accuracy_rewards", "eval/accuracy*"), "share", share=True
    ),
    Section("Reward", ("rollout/reward", "train/reward", "train/format_rewards"), "mean reward of a response"),
    Section("Cold start", ("sft/loss",), "loss of a token (nats)", xlabel="supervised step", stage="sft"),
    Section(
        "Trainer against rollout engine", ("*logprob*diff*", "mismatch/*"), "difference of log-probabilities", log=True
    ),
    Section(
        "Length of the responses",
        ("train/response_length", "train/correct_response_length", "train/wrong_response_length"),
        "tokens",
    ),
    Section("Where the time goes", ("time/*",), "seconds of a step", stacked=True),
)


def draw_curves(
    metrics_jsonl: Path | str,
    output_png: Path | str,
    *,
    title: str = "eureka",
    subtitle: str = "",
    sections: Sequence[Section] = SECTIONS,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draw a picture with one panel a section, written whole or not at all.

    levels: horizontal lines by section title, e.g. {"Accuracy": {"before": 0.42, "after": 0.87}}.

    Raises:
        UserError: the file is missing, or holds nothing that a section asks for.
    """
    if not Path(metrics_jsonl).is_file():
        raise UserError(f"{metrics_jsonl} does not exist: nothing to draw")
    records = read_metrics(metrics_jsonl)
    panels = [(section, chosen) for section in sections if (chosen := _select(section, records))]
    if not panels:
        asked = ", ".join(name for section in sections for name in section.names)
        raise UserError(f"{metrics_jsonl} holds none of the metrics to draw ({asked})")
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    height = rows * ROW_HEIGHT + HEAD
    with rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#829ab1"}):
        figure = Figure(figsize=(columns * WIDTH, height))
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (section, chosen) in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, section, chosen, (levels or {}).get(section.title, {}))
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.text(0.012, 1 - 0.32 / height, title, fontsize=17, fontweight="bold", va="center")
        figure.text(0.012, 1 - 0.64 / height, subtitle, fontsize=10.5, color="#52606d", va="center")
        figure.tight_layout(rect=(0, 0, 1, 1 - HEAD / height), w_pad=2.0, h_pad=1.6)
        target = Path(output_png)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.stem}.partial.png")
        figure.savefig(partial, dpi=110, facecolor="white")
    partial.replace(target)


def read_series(records: Sequence[Mapping[str, Any]]) -> Series:
    """Steps and values of each metric, in order of steps; what is not a number is left out."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in {**record, **record.get("timed", {})}.items():
            if name not in ("step", "time", "stage", "non_finite") and isinstance(value, int | float):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in points.items()
    }


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values; shorter at both ends. smooth([0, 3, 0], 3) is [1.5, 1, 1.5]."""
    ones = np.ones(max(1, min(window, len(values))))
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones(len(values)), ones, mode="same")


def _select(section: Section, records: Sequence[Mapping[str, Any]]) -> Series:
    found = read_series([record for record in records if record.get("stage", section.stage) == section.stage])
    return {name: found[name] for pattern in section.names for name in found if fnmatchcase(name, pattern)}


def _draw_panel(axis: Axes, section: Section, chosen: Series, levels: Mapping[str, float]) -> None:
    axis.set_title(section.title, loc="left", fontsize=12.5, fontweight="bold", pad=8)
    axis.set_xlabel(section.xlabel)
    axis.set_ylabel(section.ylabel)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if section.stacked:
        _draw_stack(axis, chosen)
    else:
        for colour, (name, (steps, values)) in zip(COLOURS, chosen.items(), strict=False):
            _draw_line(axis, steps, values, colour, _label(name), log=section.log)
    for place, (name, value) in enumerate(levels.items()):
        # A dashed line with its name on a white patch, at the right and left end by turns.
        axis.axhline(value, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), alpha=0.8)
        at, side = ((0.985, "right"), (0.015, "left"))[place % 2]
        patch = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.5}
        style: dict[str, Any] = {"va": "center", "ha": side, "fontsize": 9.5, "fontweight": "bold", "bbox": patch}
        axis.annotate(f"{name} {value:.2f}", (at, value), xycoords=("axes fraction", "data"), **style)
    if section.log and all((values > 0).any() for _, values in chosen.values()):
        axis.set_yscale("log")
        low, high = axis.get_ylim()  # whole decades, so that the few labels of a log axis are there
        axis.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
    elif section.share:
        axis.set_ylim(-0.02, 1.02)
    elif all((values >= 0).all() for _, values in chosen.values()):
        axis.set_ylim(bottom=0)
    if section.stacked:
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.2)
    elif len(chosen) > 1 or section.log:
        axis.legend(frameon=False, fontsize=9, loc="best")


def _draw_line(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, *, log: bool) -> None:
    if log:  # a difference of exactly 0 has no place on a logarithmic axis
        steps, values = steps[values > 0], values[values > 0]
    if len(values) < 8:  # few points (evaluations): nothing to smooth
        axis.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
        return
    window = max(3, len(values) // 20 | 1)
    mean = np.exp(smooth(np.log(values), window)) if log else smooth(values, window)
    axis.plot(steps, values, color=colour, alpha=RAW_ALPHA, linewidth=1.0)
    axis.plot(steps, mean, color=colour, linewidth=2.1, label=label)


def _draw_stack(axis: Axes, chosen: Series) -> None:
    """Areas in the order of their share; a phase that did not run in a step counts 0 there."""
    steps = np.unique(np.concatenate([steps for steps, _ in chosen.values()]))
    heights = {}
    for name, (own, values) in chosen.items():
        heights[name] = np.zeros(len(steps))
        heights[name][np.searchsorted(steps, own)] = values
    order = sorted(heights, key=lambda name: -heights[name].sum())
    if len(order) > len(COLOURS):
        heights["time/other"] = np.sum([heights[name] for name in order[len(COLOURS) - 1 :]], axis=0)
        order = [*order[: len(COLOURS) - 1], "time/other"]
    labels = [f"{_label(name)} {heights[name].mean():.2g} s" for name in order]
    colours = COLOURS[: len(order)]
    if len(steps) == 1:
        bottom = np.zeros(1)
        for name, colour, label in zip(order, colours, labels, strict=True):
            axis.bar(steps, heights[name], bottom=bottom, color=colour, alpha=0.85, label=label)
            bottom = bottom + heights[name]
        return
    axis.stackplot(steps, [heights[name] for name in order], labels=labels, colors=colours, alpha=0.85, linewidth=0)


def _label(name: str) -> str:
    """What LABELS says, else the name without its prefix: `train/logprob_max_abs_diff` → `logprob max abs diff`."""
    return LABELS.get(name) or name.partition("/")[2].replace("_", " ") or name
