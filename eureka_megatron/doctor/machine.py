"""Cores, memory, disk, Slurm, wandb: what does not depend on the packages."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from eureka_megatron.doctor.finding import Answer
from eureka_megatron.doctor.gpu import Machine
from eureka_megatron.tracking.login import has_wandb_login

GIB = 2**30


def ask_slurm(machine: Machine) -> Answer:
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return Answer("absent", "–")
    return Answer("present", _output(["sinfo", "--version"]))


def ask_wandb(machine: Machine) -> Answer:
    return Answer("present", "a key is there") if has_wandb_login() else Answer("absent", "–")


def ask_cores(machine: Machine) -> Answer:
    cores = usable_cores()
    return Answer("present" if cores >= 2 else "limited", f"{cores}")


def ask_memory(machine: Machine) -> Answer:
    memory = usable_memory_bytes() / GIB
    return Answer("present" if memory >= 12 else "limited", f"{memory:.0f} GiB")


def ask_shm(machine: Machine) -> Answer:
    room = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    total, free = (room.total / GIB, room.free / GIB) if room else (0.0, 0.0)
    return Answer("present" if free >= 2 else "limited", f"{free:.1f} free of {total:.1f} GiB")


def ask_disk(machine: Machine) -> Answer:
    disk = shutil.disk_usage(machine.folder).free / GIB
    return Answer("present" if disk >= 10 else "limited", f"{disk:.0f} GiB")


def ask_compiler(machine: Machine) -> Answer:
    """Triton builds the launcher of every kernel with it, against the interpreter's headers; many images have neither."""
    name = os.environ.get("CC") or next((name for name in ("gcc", "clang") if shutil.which(name)), None)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    version = "{}.{}".format(*sys.version_info)
    return Answer(
        "absent" if name is None else ("present" if headers else "limited"),
        f"{name or 'none'}" + ("" if headers else f"; no Python.h of Python {version}"),
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
