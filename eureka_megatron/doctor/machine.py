"""Cores, memory, disk, Slurm, wandb: what does not depend on the packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from eureka_megatron.doctor.finding import Finding
from eureka_megatron.tracking.login import has_wandb_login

GIB = 2**30


def service_findings() -> list[Finding]:
    slurm = shutil.which("sbatch") and shutil.which("sinfo")
    login = has_wandb_login()
    return [
        Finding(
            "Slurm",
            "present" if slurm else "absent",
            _output(["sinfo", "--version"]) if slurm else "–",
            required=False,
            lost="jobs cannot be queued from here; runs on this machine do not need it",
            fix="ssh to a login node of your cluster",
        ),
        Finding(
            "wandb login",
            "present" if login else "absent",
            "a key is there" if login else "–",
            required=False,
            lost="wandb records offline; metrics.jsonl and TensorBoard are complete either way",
            fix="wandb login (wandb sync DIR uploads offline runs later)",
        ),
    ]


def machine_findings(folder: Path) -> list[Finding]:
    """`folder` is where runs would be written."""
    cores, memory = usable_cores(), usable_memory_bytes() / GIB
    disk = shutil.disk_usage(folder).free / GIB
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    shared, unused = (shm.total / GIB, shm.free / GIB) if shm else (0.0, 0.0)
    return [
        Finding(
            "cores",
            "present" if cores >= 2 else "limited",
            f"{cores}",
            required=False,
            lost="with fewer than 2 the demo's ranks and engine take turns",
            fix="sbatch --cpus-per-task=8 (a larger allocation)",
        ),
        Finding(
            "memory",
            "present" if memory >= 12 else "limited",
            f"{memory:.0f} GiB",
            required=False,
            lost="the demo needs about 12 GiB with vLLM",
            fix="sbatch --mem=32G (a larger allocation)",
        ),
        Finding(
            "/dev/shm",
            "present" if unused >= 2 else "limited",
            f"{unused:.1f} free of {shared:.1f} GiB",
            required=False,
            lost="with less than 2 GiB free Ray keeps its objects on disk, and weights arrive slowly",
            fix="sudo mount -o remount,size=8G /dev/shm (docker run: --shm-size=8g)",
        ),
        Finding(
            "free disk here",
            "present" if disk >= 10 else "limited",
            f"{disk:.0f} GiB",
            required=False,
            lost="the installation takes 4 GiB; a 7B checkpoint with optimizer takes about 100 GiB",
            fix="run.output=DIR on a larger file system",
        ),
        _compiler(),
    ]


def _compiler() -> Finding:
    """Triton builds the launcher of every kernel with it, against the interpreter's headers; many images have neither."""
    name = os.environ.get("CC") or next((name for name in ("gcc", "clang") if shutil.which(name)), None)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    version = "{}.{}".format(*sys.version_info)
    return Finding(
        "C compiler",
        "absent" if name is None else ("present" if headers else "limited"),
        f"{name or 'none'}" + ("" if headers else f"; no Python.h of Python {version}"),
        required=False,
        lost="on GPUs Triton's kernels, which vLLM runs with",
        fix=f"sudo apt-get install gcc python{version}-dev",
    )


def usable_cores() -> int:
    """Cores this process may use: its affinity (Slurm, taskset), or a container's quota where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores


def usable_memory_bytes() -> int:
    """Memory of the machine, or of the container where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "present"
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"
