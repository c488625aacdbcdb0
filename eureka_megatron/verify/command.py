"""`eureka verify`: one process a rank, then the figures as text or JSON."""

import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import check_layout, read_hf_config
from eureka_megatron.verify.layout import Job, Layout
from eureka_megatron.verify.measure import BARS, measure
from eureka_megatron.verify.reference import write_reference
from eureka_megatron.verify.samples import made_up_samples


def run_verify(hf_dir: Path, layout: Layout, *, grads: bool = False, as_json: bool = False) -> int:
    """Print the figures. → exit code 0 when all are within their bars, else 1.

    Raises:
        UserError: no such checkpoint, or a layout that it cannot have.
    """
    check_layout(read_hf_config(hf_dir), layout.tensor, layout.pipeline)
    with tempfile.TemporaryDirectory(prefix="eureka-verify-") as folder:
        reference = Path(folder) / "reference.safetensors"
        samples = made_up_samples(hf_dir)
        write_reference(hf_dir, reference, samples, grads=grads)
        job = Job(str(hf_dir), str(reference), tuple(samples), grads=grads, **asdict(layout))
        report = _on_ranks(job, Path(folder))
    print(json.dumps(report, indent=2) if as_json else describe(report))
    return 0 if report["passed"] else 1


def describe(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    lines = [f"{report['hf']} at {Layout(**report['layout'])}"]
    for name, value in report["figures"].items():
        where = f"  worst: {report['worst'][name]}" if name in report["worst"] else ""
        verdict = "ok" if value <= BARS[name] else "TOO LARGE"
        lines.append(f"  {name:<11} {value:.2e}  (bar {BARS[name]:.0e})  {verdict}{where}")
    return "\n".join([*lines, "passed" if report["passed"] else "FAILED"])


def _on_ranks(job: Job, folder: Path) -> dict[str, Any]:
    """`measure` in one process a rank; what a rank says to the user, it says to the user of this process."""
    try:
        torch.multiprocessing.spawn(
            _spawned, args=(job, f"tcp://127.0.0.1:{_free_port()}", folder), nprocs=job.world_size
        )
    except torch.multiprocessing.ProcessExitedException:
        if complaint := next(folder.glob("error-*"), None):
            raise UserError(complaint.read_text()) from None
        raise
    return json.loads((folder / "report.json").read_text())


def _spawned(rank: int, job: Job, address: str, folder: Path) -> None:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.world_size))
    try:
        report = measure(rank, job, address)
    except UserError as error:
        (folder / f"error-{rank}").write_text(str(error))
        sys.exit(error.exit_code)
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
