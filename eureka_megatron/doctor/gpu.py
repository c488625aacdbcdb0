"""Driver, torch and GPUs: what the driver says (nvidia-smi), and what torch says in a process of its own."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from eureka_megatron.doctor.finding import Answer
from eureka_megatron.doctor.installation import Kind, install_one, install_pins, installed

PROBE_SECONDS = 120  # importing torch from a cold network file system can take a minute
DRIVER_SECONDS = 20
# Oldest driver branch for programs built with this major version of CUDA (NVIDIA's table of minor version compatibility).
DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
PINNED_CUDA = 13
CAPABILITY = 8.0  # bf16 and torch's flash attention
GPU_PYTHON = (3, 12)
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "gpus": [], "nccl": None, "gloo": torch.distributed.is_gloo_available()}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found["gpus"].append([f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB", float(f"{gpu.major}.{gpu.minor}")])
if torch.distributed.is_nccl_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    import torchvision
    found["torchvision"] = torchvision.__version__
except Exception as error:
    found["torchvision_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Driver:
    """Example: Driver("580.159.04", ("NVIDIA H100 80GB HBM3",)); Driver(problem="no nvidia-smi") where there is none."""

    version: str = ""
    gpus: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Torch:
    """Example: Torch("2.13.0+cu130", "13.0", (("NVIDIA H100 80GB HBM3 79 GiB", 9.0),), "2.29.7", "0.28.0")."""

    version: str | None = None
    cuda: str | None = None  # None: a CPU build
    gpus: tuple[tuple[str, float], ...] = ()  # name with memory, compute capability
    nccl: str | None = None
    torchvision: str | None = None
    torchvision_problem: str = "not tried: torch does not import"
    problem: str = field(default="")  # why it does not import


def ask_driver() -> Driver:
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except OSError:
        return Driver(problem="no nvidia-smi")
    except subprocess.TimeoutExpired:
        return Driver(problem=f"nvidia-smi takes more than {DRIVER_SECONDS} s")
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        return Driver(problem=next(iter((done.stdout + done.stderr).strip().splitlines()), "nvidia-smi shows no GPU"))
    return Driver(rows[0][0], tuple(name for _, name in rows))


def start_probe() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_probe(probe: subprocess.Popen[str]) -> Torch:
    version = installed("torch")
    missing = "" if version else "not installed"
    try:
        output, errors = probe.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return Torch(version, problem=f"import takes more than {PROBE_SECONDS} s")
    if probe.returncode:
        last = (errors.strip().splitlines() or [f"import exits {probe.returncode}"])[-1]
        return Torch(version, problem=missing or last)
    found = json.loads(output.splitlines()[-1])
    return Torch(
        version or "of unknown version",
        found["cuda"],
        tuple((name, capability) for name, capability in found["gpus"]),
        found["nccl"],
        found.get("torchvision"),
        found.get("torchvision_error", ""),
    )


@dataclass(frozen=True)
class Machine:
    """What the checks are asked about; `folder` is where runs would be written."""

    folder: Path
    driver: Driver
    torch: Torch

    @property
    def kind(self) -> Kind:
        """Which file of requirements/ it is judged by: that of torch's build, without a torch that of the hardware."""
        return "gpu" if (self.driver.gpus if self.torch.problem else self.torch.cuda) else "cpu"


def ask_python(machine: Machine) -> Answer:
    known = sys.version_info >= (3, 11)
    fits = machine.kind == "cpu" or sys.version_info[:2] == GPU_PYTHON
    return Answer(
        ("present" if fits else "limited") if known else "absent",
        platform.python_version() + ("" if fits else ", the GPU pins are for 3.12"),
        lost=None if known else "nothing runs",
        fix="make install-gpu PYTHON=python3.12" if machine.kind == "gpu" else "make install PYTHON=python3.11",
    )


def ask_nvidia_driver(machine: Machine) -> Answer:
    driver, built = machine.driver, machine.torch.cuda
    cuda = int(built.partition(".")[0]) if built else PINNED_CUDA
    needed = DRIVER_OF_CUDA.get(cuda, DRIVER_OF_CUDA[PINNED_CUDA])
    old = bool(driver.version) and int(driver.version.partition(".")[0]) < needed
    return Answer(
        "absent" if driver.problem else ("limited" if old else "present"),
        driver.problem or driver.version + (f", older than {needed}, which CUDA {cuda} needs" if old else ""),
        fix=f"sudo apt-get install nvidia-driver-{needed} (Ubuntu; elsewhere who runs the node), then reboot",
    )


def ask_torch(machine: Machine) -> Answer:
    torch = machine.torch
    return Answer("absent" if torch.problem else "present", torch.problem or str(torch.version))


def ask_torchvision(machine: Machine) -> Answer:
    torch = machine.torch
    mend = "python tools/mend_torchvision.py" if machine.kind == "cpu" else install_one("torchvision", "gpu")
    found = torch.torchvision or torch.torchvision_problem
    return Answer("present" if torch.torchvision else "absent", found, fix=None if torch.problem else mend)


def ask_devices(machine: Machine) -> Answer:
    driver, torch = machine.driver, machine.torch
    shown = f"the driver shows {counted(list(driver.gpus))}"
    if torch.gpus:
        weak = any(capability < CAPABILITY for _, capability in torch.gpus)
        found = f"{counted([name for name, _ in torch.gpus])}, CUDA {torch.cuda}"
        if not weak:
            return Answer("present", found)
        lost = "bf16 flash attention, which training needs"
        return Answer("limited", f"{found}; compute capability below {CAPABILITY}", lost=lost)
    if not driver.gpus:
        return Answer("absent", "none")
    built = f"built for CUDA {torch.cuda}" if torch.cuda else "a CPU build"
    fix = (
        "unset CUDA_VISIBLE_DEVICES, or see the row of the driver" if torch.cuda else "make install-gpu VENV=.venv-gpu"
    )
    return Answer("absent", shown if torch.problem else f"{shown}, torch none: {built}", fix=fix)


def ask_nccl(machine: Machine) -> Answer:
    nccl, fix = machine.torch.nccl, f"{install_pins('gpu')} (every CUDA build of torch has it)"
    return Answer("present" if nccl else "absent", nccl or "this build of torch has none", fix=fix)


def counted(names: list[str]) -> str:
    """Example: "2 × H200, 1 × L4"."""
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
