"""`eureka plan`: what would be trained on which GPUs, a table by arithmetic at once, the best layouts rehearsed, the answer as YAML and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eureka_megatron.config import RunConfig, load_config, make_config
from eureka_megatron.errors import ConfigError, nearest
from eureka_megatron.gpus import GPUS, Gpu
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.planning import report
from eureka_megatron.planning.predict import Work
from eureka_megatron.planning.published import configuration, sizes_of
from eureka_megatron.planning.search import Ask, Outcome, least_gpus, rehearsed, search
from eureka_megatron.planning.workload import picture_units
from eureka_megatron.tracking.console import tell, tell_table
from eureka_megatron.weights.table import expand, frozen_rows, rows

SHOWN = 6
REHEARSED, SECONDS = 3, 20.0  # layouts, and the time after which no further one is begun
QUESTION = 128  # tokens of a prompt's text
MEAN_RESPONSE = 1024  # tokens; published runs of 7B and 32B lie between 500 and 1,500
# What the published runs freeze; without a recipe it is what is asked about.
FREEZE = ("vision", "merger")


@dataclass(frozen=True)
class Options:
    """The command line's, see cli/arguments.py."""

    gpus: int
    model: str | None = None
    recipe: Path | None = None
    gpu: str = "h100"
    gpu_memory: float | None = None
    gpus_per_node: int = 8
    max_pixels: int | None = None
    tokens: int | None = None
    response_tokens: int = MEAN_RESPONSE
    price: float | None = None
    out: Path = Path("plan")
    as_json: bool = False


def run_plan(options: Options, overrides: Sequence[str] = ()) -> None:
    """Prints what it finds and writes `out`/layout.yaml and `out`/plan.png.

    Raises:
        ConfigError: an unknown GPU or model, or too few GPUs, with how many would do.
    """
    ask = asked(options, list(overrides))
    say = (lambda text: None) if options.as_json else tell
    say(report.assumptions(ask))
    found = search(ask)
    if not found.fitting:
        raise ConfigError(_too_few(ask))
    if not options.as_json:
        tell_table(report.COLUMNS, [report.row(outcome) for outcome in found.fitting[:SHOWN]])
    say("by arithmetic; the first of them rehearsed with the code that trains, on tensors without memory:")

    def told(outcome: Outcome) -> None:
        say(f"  {outcome.candidate}: {report.row(outcome)[5]} GiB{'' if outcome.fits() else ', does not fit'}")

    done = rehearsed(found.fitting, seconds=SECONDS, wanted=REHEARSED, told=told)
    best = done[0]
    if not best.fits():
        raise ConfigError(f"none of the {len(done)} layouts that were rehearsed fits; {_too_few(ask)}")
    others = [outcome for outcome in found.fitting if outcome.candidate not in [one.candidate for one in done]]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "layout.yaml").write_text(report.fragment(best), encoding="utf-8")
    report.draw(best, options.out / "plan.png")
    if options.as_json:
        print(json.dumps(_as_json(best), indent=1))
        return
    tell_table(report.COLUMNS, [report.row(outcome) for outcome in [*filter(Outcome.fits, done), *others][:SHOWN]])
    for line in (*report.refused(found.too_large, best), *report.summary(best, options.price)):
        say(line)
    say(report.fragment(best).rstrip())
    say(
        f"written: {options.out / 'layout.yaml'}, {options.out / 'plan.png'}; times are predictions, see docs/planning.md"
    )


def asked(options: Options, overrides: list[str]) -> Ask:
    """What the options mean."""
    if options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: unknown{nearest(options.gpu, GPUS)}; known: {', '.join(GPUS)}")
    gpu = GPUS[options.gpu]
    if options.gpu_memory is not None:
        gpu = replace(gpu, memory=options.gpu_memory)
    if options.recipe is None and options.model is None:
        raise ConfigError("eureka plan: --model or --recipe says what is to be trained")
    if options.recipe is not None:
        run = load_config(options.recipe, overrides)
    else:
        given: dict[str, Any] = {"model": {"path": str(options.model), "freeze": FREEZE}, "data": {"train": "-"}}
        run = make_config(given, "eureka plan")
    model = configuration(options.model or run.model.path)
    config = sizes_of(model)
    return ask_of(run, model, config, gpu, options)


def ask_of(run: RunConfig, model: Path, config: QwenVLConfig, gpu: Gpu, options: Options) -> Ask:
    if run.model.dtype != "bfloat16":
        raise ConfigError(f"model.dtype={run.model.dtype}: plans are for bfloat16")
    pixels = options.max_pixels or run.data.max_pixels
    prompt = min(picture_units(config, pixels) + QUESTION, run.data.max_prompt_tokens)
    response = min(options.response_tokens, run.rollout.max_response_tokens)
    work = Work.of(run, prompt, response, tower_is_frozen(config, run.model.freeze))
    work = replace(work, pixels=pixels, longest=options.tokens or work.longest)
    if work.longest < work.sample_tokens:
        raise ConfigError(
            f"--tokens {work.longest}: a sample has {work.sample_tokens} on average already; lower --response-tokens or --max-pixels"
        )
    return Ask(model, config, run, work, gpu, options.gpus, min(options.gpus_per_node, options.gpus))


def tower_is_frozen(config: QwenVLConfig, freeze: Sequence[str]) -> bool:
    """Whether the vision tower's blocks do not learn."""
    table = expand(rows(config))
    frozen = frozen_rows(table, tuple(freeze))
    tower = {row.megatron for row in table if row.megatron.startswith("vision.") and "merger" not in row.megatron}
    return tower <= frozen


def _too_few(ask: Ask) -> str:
    gpus = least_gpus(ask)
    what = f"{ask.gpus} × {ask.gpu.memory:g} GiB are too few for this model"
    if gpus is None:
        return f"{what}, and 1,024 would be: raise --gpu-memory, or lower --tokens"
    if gpus < ask.gpus:  # a number that divides into nothing
        return f"{what} in a layout that divides {ask.gpus}: {gpus} would do"
    return f"{what}: it needs at least {gpus} GPUs of this size"


def _as_json(best: Outcome) -> dict[str, Any]:
    return {
        "layout": report.keys(best),
        "seconds": {"step": best.step, **best.seconds},
        "memory": {"usable": best.room, "by_stage": {load.stage: report.parts_of(load) for load in best.loads}},
        "rehearsed": best.rehearsed,
    }
