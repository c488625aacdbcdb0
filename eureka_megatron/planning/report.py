"""What a search has found, for readers: tables, the reasons of what does not fit, a fragment of YAML, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from eureka_megatron.models.qwen2_5_vl.operations import text_operations, text_parameters, tower_parameters
from eureka_megatron.planning import hardware
from eureka_megatron.planning.hardware import GIB
from eureka_megatron.planning.load import Load
from eureka_megatron.planning.search import Ask, Outcome, axes, search

TRAIN = ("linears", "attention", "other operations", "tensor and context", "pipeline", "update")
COLUMNS = [
    "layout",
    "GPUs",
    "recompute",
    "micro-batch",
    "engines",
    "peak GiB",
    "step s",
    "rollout",
    "train",
    "sync",
    "MFU",
]
MEMORY = ("parameters", "gradients", "optimizer", "activations")


def row(outcome: Outcome) -> list[str]:
    """A line of the table; COLUMNS names its cells."""
    shape, engines, seconds = outcome.candidate.shape, outcome.candidate.engines, outcome.seconds
    train = sum(seconds[part] for part in TRAIN)
    return [
        axes(shape.layout),
        "colocated" if engines.colocated else f"{shape.layout.world_size} + {engines.count * engines.tensor}",
        shape.recompute,
        str(shape.tokens),
        f"{engines.count} × {engines.tensor}",
        f"{outcome.peak / GIB:.1f} of {outcome.room / GIB:.1f}",
        f"{outcome.step:.0f}",
        f"{seconds['rollout']:.0f}",
        f"{train:.0f}",
        f"{seconds['sync'] + seconds['switch']:.1f}",
        f"{model_operations(outcome.ask) / train / outcome.ask.gpu.matrix / 1e12 / shape.layout.world_size:.0%}",
    ]


def model_operations(ask: Ask) -> float:
    """Floating-point operations of a rollout step's updates: forward and backward of every sample once, nothing that is computed again, nor what samples share."""
    work = ask.work
    apart = text_operations(ask.config, [work.sample_tokens]) * work.responses
    saved = text_operations(ask.config, [work.prompt_tokens]) * (work.responses - work.prompts)
    return 3 * (apart - (saved if work.share_prompts else 0))


def assumptions(ask: Ask) -> str:
    work = ask.work
    tower = "frozen" if work.frozen_tower else "learning"
    return (
        f"{ask.gpus} × {ask.gpu.name} ({ask.gpu.memory:g} GiB), {work.prompts} prompts × {work.samples} responses a step, samples of "
        f"{work.sample_tokens} tokens on average ({work.response_tokens} of them the response) and {work.longest} at most, tower {tower}"
    )


def summary(outcome: Outcome, price: float | None) -> list[str]:
    """What else a reader wants to know of the layout that was chosen."""
    ask, engines = outcome.ask, outcome.candidate.engines
    tokens = engines.cache_tokens(ask.config, ask.gpu)
    hours = outcome.step * ask.work.steps / 3600
    learning = text_parameters(ask.config) + (0 if ask.work.frozen_tower else tower_parameters(ask.config))
    nbytes = 2 * (text_parameters(ask.config) + tower_parameters(ask.config)) + 12 * learning
    nodes = -(-ask.gpus // ask.node)
    cost = f", {hours * ask.gpus * price:,.0f} at {price:g} a GPU-hour" if price else " (cost: --price PER_GPU_HOUR)"
    return [
        f"engines: {engines.memory:.0%} of a GPU, KV cache of {tokens:,} tokens, {tokens // ask.work.sample_tokens} samples at once in each of {engines.count}",
        f"{ask.work.steps} steps: {hours:,.0f} hours, {hours * ask.gpus:,.0f} GPU-hours{cost}",
        f"a checkpoint: {nbytes / GIB:,.0f} GiB, {nbytes / 1e9 / hardware.STORAGE / nodes:,.0f} s at {hardware.STORAGE:g} GB/s a node, while training goes on",
    ]


def refused(found: Sequence[Outcome], best: Outcome) -> list[str]:
    """Why what would be faster than `best` was not taken, at most three lines."""
    lines, seen = list[str](), {best.candidate.where}
    for outcome in found:
        if outcome.step >= best.step or len(lines) == 3:
            break
        if outcome.candidate.where in seen:
            continue
        seen.add(outcome.candidate.where)
        worst = max(outcome.loads, key=lambda load: load.peak)
        parts = parts_of(worst)
        largest = max(parts, key=lambda name: parts[name])
        lines.append(
            f"{axes(outcome.candidate.shape.layout)}, {'colocated' if outcome.candidate.engines.colocated else 'split'}, would take {outcome.step:.0f} s "
            f"but not fit: {largest} {parts[largest] / GIB:.0f} GiB, all {worst.peak / GIB:.0f} of {outcome.room / GIB:.0f} at micro-batch "
            f"{outcome.candidate.shape.tokens}{_remedy(outcome)}"
        )
    return lines


def _remedy(outcome: Outcome) -> str:
    for other in search(outcome.ask).fitting:
        if other.candidate.where == outcome.candidate.where:
            shape = other.candidate.shape
            changes = (
                [f"model.recompute={shape.recompute}"] if shape.recompute != outcome.candidate.shape.recompute else []
            )
            changes += [f"micro-batches of {shape.tokens}"] if shape.tokens != outcome.candidate.shape.tokens else []
            return f"; {' and '.join(changes)} would fit, in {other.step:.0f} s"
    return ""


def parts_of(load: Load) -> dict[str, float]:
    """Bytes by what they are, at the moment of the most."""
    return {
        "parameters": load.parameters,
        "gradients": load.gradients,
        "optimizer": load.optimizer,
        "activations": max(load.passes, load.update),
    }


def keys(outcome: Outcome) -> dict[str, Any]:
    """The layout as a run's configuration has it."""
    shape, engines = outcome.candidate.shape, outcome.candidate.engines
    parallel = shape.layout.model_dump(exclude_defaults=True)
    return {
        "placement": "colocated" if engines.colocated else "split",
        "model": {"recompute": shape.recompute},
        **({"parallel": parallel} if parallel else {}),
        "rollout": {"engines": engines.count, "tensor": engines.tensor, "gpu_memory_utilization": engines.memory},
        "training": {"max_tokens_per_micro_batch": shape.tokens},
    }


def fragment(outcome: Outcome) -> str:
    """YAML for a recipe."""
    how = "rehearsed" if outcome.rehearsed else "by arithmetic"
    comment = f"# {assumptions(outcome.ask)}\n# peak {outcome.peak / GIB:.1f} of {outcome.room / GIB:.1f} GiB ({how}), {outcome.step:.0f} s a step (predicted, never measured)\n"
    return comment + yaml.safe_dump(keys(outcome), sort_keys=False)


def draw(outcome: Outcome, path: Path) -> None:
    """Memory by part of each kind of rank, a step's time by part, and the step on more GPUs."""
    from matplotlib.figure import Figure

    from eureka_megatron.tracking.curves import COLOURS, GRID, INK

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle(f"{outcome.candidate}\n{assumptions(outcome.ask)}", fontsize=9, color=INK)
    memory, times, scaling = figure.subplots(1, 3)
    names = [f"stage {load.stage}" for load in outcome.loads]
    left = [0.0] * len(names)
    for name, colour in zip(MEMORY, COLOURS, strict=False):
        values = [parts_of(load)[name] / GIB for load in outcome.loads]
        memory.barh(names, values, left=left, color=colour, label=name, height=0.5)
        left = [a + b for a, b in zip(left, values, strict=True)]
    memory.axvline(outcome.room / GIB, color=INK, linestyle="--", linewidth=1)
    memory.set(title="memory of a rank (dashed: usable)", xlabel="GiB")
    memory.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    parts = {name: value for name, value in outcome.seconds.items() if value > 0.005 * outcome.step}
    times.barh(list(parts)[::-1], list(parts.values())[::-1], color=COLOURS[0], height=0.6)
    times.set(title=f"a rollout step: {outcome.step:.0f} s", xlabel="seconds")
    points = scaled(outcome.ask)
    scaling.plot([gpus for gpus, _ in points], [step for _, step in points], color=COLOURS[0], marker="o", markersize=3)
    scaling.set(title="the same step on other numbers of GPUs", xlabel="GPUs", ylabel="seconds")
    scaling.set_xscale("log", base=2)
    scaling.set_yscale("log", base=2)
    for ticks in (scaling.xaxis, scaling.yaxis):
        ticks.set_major_formatter("{x:g}")
    for axis in (memory, times, scaling):
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def scaled(ask: Ask) -> list[tuple[int, float]]:
    """(GPUs, seconds of the best step by arithmetic) for powers of two up to 1,024 and the asked number."""
    sizes = sorted({2**power for power in range(11)} | {ask.gpus})
    found = ((gpus, search(replace(ask, gpus=gpus)).fitting) for gpus in sizes)
    return [(gpus, fitting[0].step) for gpus, fitting in found if fitting]
