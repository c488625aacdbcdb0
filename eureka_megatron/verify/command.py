"""`eureka verify`: one process a rank, then the figures as text or JSON."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import check_layout, read_hf_config
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.verify.engine import engine_report, native_logprobs
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.measure import measure
from eureka_megatron.verify.reference import write_reference
from eureka_megatron.verify.rounding import PICTURES, measure_rounding, write_rounded_references
from eureka_megatron.verify.samples import made_up_samples
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE

# What a report says of the layout, where nothing was chosen.
DEFAULTS = Layout().model_dump() | Execution().model_dump(include={"recompute", "backend"})


def run_verify(
    hf_dir: Path,
    layout: Layout,
    execution: Execution = Execution(),
    *,
    against: str = "transformers",
    grads: bool = False,
    as_json: bool = False,
) -> int:
    """Print the figures. → exit code 0 when all are within their bars, else 1.

    Args:
        execution: of dtype "float32", or "bfloat16" for the kernels that train, see `rounding`.
        against: "transformers", or "vllm" for log-probabilities alone, see `engine`.
        grads: compare gradients too.

    Raises:
        UserError: no such checkpoint, a layout that it cannot have, or gradients of an engine.
    """
    if against == "vllm" and grads:
        raise ConfigError("eureka verify: --grads needs --against transformers; an engine has no gradients")
    if against == "transformers":
        _require_hf_files(hf_dir)
    check_layout(read_hf_config(hf_dir), layout)
    exact = execution.dtype == "float32"
    with tempfile.TemporaryDirectory(prefix="eureka-verify-") as folder:
        reference = Path(folder) / "reference.safetensors"
        samples = made_up_samples(hf_dir, pictures=() if exact else PICTURES)
        job = Job(str(hf_dir), str(reference), tuple(samples), layout, execution, grads=grads)
        progress, ranks = sys.stderr if as_json else None, counted(layout.world_size, "rank")
        if against == "transformers":
            tell(
                f"transformers computes {counted(len(samples), 'sample')}{' and gradients' if grads else ''} …",
                progress,
            )
            if exact:
                write_reference(hf_dir, reference, samples, grads=grads)
            else:
                job = replace(job, rounded=str(Path(folder) / "rounded.safetensors"))
                write_rounded_references(job)
            tell(f"the native model on the same, {ranks} …", progress)
            report = _on_ranks(measure if exact else measure_rounding, job, Path(folder))
        else:
            tell(f"the native model computes {counted(len(samples), 'sample')}, {ranks} …", progress)
            native_values = _on_ranks(native_logprobs, job, Path(folder))
            tell("a vLLM engine starts and computes the same …", progress)
            report = engine_report(job, native_values)
    how = execution.model_dump(include={"recompute", "backend"})
    report = {"against": against, "layout": layout.model_dump() | how} | report
    print(json.dumps(report, indent=2) if as_json else describe(report))
    return 0 if report["passed"] else 1


def _require_hf_files(directory: Path) -> None:
    """What transformers would report by a traceback, or not at all."""
    read_hf_config(directory)
    if (directory / METADATA_FILE).is_file():
        raise UserError(
            f"{directory} is in Megatron's format, which transformers does not read: name the HF directory, or one made by "
            "eureka convert megatron-to-hf (--against vllm takes both)"
        )
    Reader(directory)


def describe(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    chosen = [f"{name} {value}" for name, value in report["layout"].items() if value != DEFAULTS[name]]
    lines = [f"{report['hf']} at {', '.join(chosen) or 'one rank'}, against {report['against']}, in {report['dtype']}"]
    lines += (_engine_lines if report["against"] == "vllm" else _figure_lines)(report)
    return "\n".join([*lines, "passed" if report["passed"] else "FAILED"])


def _engine_lines(report: dict[str, Any]) -> list[str]:
    lines = ["  log-probabilities, absolute differences in nats:"]
    for kind, figures in report["figures"].items():
        verdict = "ok" if all(figures[name] <= bar for name, bar in report["bars"].items()) else "TOO LARGE"
        numbers = "  ".join(f"{name} {figures[name]:.2e} (bar {bar:.0e})" for name, bar in report["bars"].items())
        lines.append(f"    {kind:<14} {numbers}  {verdict}  {figures['tokens']} tokens")
    return lines


def _figure_lines(report: dict[str, Any]) -> list[str]:
    lines, of_transformers = [], report.get("transformers", {})
    for name, value in report["figures"].items():
        where = f"  worst: {report['worst'][name]}" if name in report["worst"] else ""
        beside = f"transformers {of_transformers[name]:.2e}, " if name in of_transformers else ""
        bar = report["bars"][name]
        verdict = "ok" if value <= bar else "TOO LARGE"
        lines.append(f"  {name:<14} {value:.2e}  ({beside}bar {bar:.{2 if beside else 0}e})  {verdict}{where}")
    if of_transformers:
        lines.append("  error of what leaves each module, as a multiple of transformers':")
        ratios = {
            name: value / max(report["depths_transformers"][name], 1e-30) for name, value in report["depths"].items()
        }
        lines += _depth_lines(ratios, ".2f")
    else:
        lines += ["  largest relative difference of what leaves each module:", *_depth_lines(report["depths"])]
    if report["begins"] is not None:
        lines.append(f"  the difference begins at {report['begins']}")
    return lines


def _depth_lines(depths: dict[str, float], form: str = ".1e") -> list[str]:
    """Modules of a list side by side, eight a line."""
    kinds: dict[str, list[str]] = {}
    for name, value in depths.items():
        kinds.setdefault(re.sub(r"\d+", "{}", name), []).append(f"{value:{form}}")
    return [
        f"    {kind.format(start):<25}" + " ".join(values[start : start + 8])
        for kind, values in kinds.items()
        for start in range(0, len(values), 8)
    ]


def _on_ranks(body: Callable[[int, Job, str], Any], job: Job, folder: Path) -> Any:
    """`body(rank, job, address)` in one process a rank. → what the one rank returns that does not return None.

    What a rank says to the user, it says to the user of this process.
    """
    try:
        address = f"file://{folder / 'rendezvous'}"
        torch.multiprocessing.spawn(_spawned, args=(body, job, address, folder), nprocs=job.layout.world_size)
    except torch.multiprocessing.ProcessExitedException:
        if complaint := next(folder.glob("error-*"), None):
            raise UserError(complaint.read_text()) from None
        raise
    return json.loads((folder / "result.json").read_text())


def _spawned(rank: int, body: Callable[[int, Job, str], Any], job: Job, address: str, folder: Path) -> None:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.layout.world_size))
    try:
        result = body(rank, job, address)
    except UserError as error:
        (folder / f"error-{rank}").write_text(str(error))
        sys.exit(error.exit_code)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
