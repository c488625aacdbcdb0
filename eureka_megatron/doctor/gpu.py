"""Driver, torch and GPUs: what the driver says (nvidia-smi), and what torch says in a process of its own."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field

from eureka_megatron.doctor.finding import Finding
from eureka_megatron.doctor.installation import (
    Kind,
    differences,
    install_one,
    install_pins,
    installed,
    pins,
    shortened,
)

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


def kind_of(driver: Driver, torch: Torch) -> Kind:
    """Which file of requirements/ this machine is judged by: that of torch's build, without a torch that of the hardware."""
    if torch.problem:
        return "gpu" if driver.gpus else "cpu"
    return "gpu" if torch.cuda else "cpu"


def gpu_findings(driver: Driver, torch: Torch) -> list[Finding]:
    kind = kind_of(driver, torch)
    return [
        _python(kind),
        _driver(driver, torch),
        _torch(torch, kind),
        _torchvision(torch, kind),
        _devices(driver, torch),
        Finding(
            "NCCL",
            "present" if torch.nccl else "absent",
            torch.nccl or "this build of torch has none",
            required=False,
            lost="ranks talk through gloo, weights reach the rollout engines through Ray's object store",
            fix=f"{install_pins('gpu')} (every CUDA build of torch has it)",
        ),
        _pinned(kind),
    ]


def _python(kind: Kind) -> Finding:
    known = sys.version_info >= (3, 11)
    fits = kind == "cpu" or sys.version_info[:2] == GPU_PYTHON
    command = "make install-gpu PYTHON=python3.12" if kind == "gpu" else "make install PYTHON=python3.11"
    return Finding(
        "python",
        ("present" if fits else "limited") if known else "absent",
        platform.python_version() + ("" if fits else ", the GPU pins are for 3.12"),
        required=True,
        lost="the pinned set of packages, which is the tested one" if known else "nothing runs",
        fix=command,
    )


def _driver(driver: Driver, torch: Torch) -> Finding:
    cuda = int(torch.cuda.partition(".")[0]) if torch.cuda else PINNED_CUDA
    needed = DRIVER_OF_CUDA.get(cuda, DRIVER_OF_CUDA[PINNED_CUDA])
    old = bool(driver.version) and int(driver.version.partition(".")[0]) < needed
    return Finding(
        "NVIDIA driver",
        "absent" if driver.problem else ("limited" if old else "present"),
        driver.problem or driver.version + (f", older than {needed}, which CUDA {cuda} needs" if old else ""),
        required=False,
        lost="no GPU can be used",
        fix=f"sudo apt-get install nvidia-driver-{needed} (Ubuntu; elsewhere who runs the node), then reboot",
    )


def _torch(torch: Torch, kind: Kind) -> Finding:
    return Finding(
        "torch",
        "absent" if torch.problem else "present",
        torch.problem or str(torch.version),
        required=True,
        lost="nothing runs",
        fix=install_pins(kind),
    )


def _torchvision(torch: Torch, kind: Kind) -> Finding:
    mend = "python tools/mend_torchvision.py" if kind == "cpu" else install_one("torchvision", "gpu")
    return Finding(
        "torchvision import",
        "present" if torch.torchvision else "absent",
        torch.torchvision or torch.torchvision_problem,
        required=True,
        lost="transformers and vLLM cannot process pictures",
        fix=install_pins(kind) if torch.problem else mend,
    )


def _devices(driver: Driver, torch: Torch) -> Finding:
    names = [name for name, _ in torch.gpus]
    weak = any(capability < CAPABILITY for _, capability in torch.gpus)
    if names:
        found = f"{counted(names)}, CUDA {torch.cuda}" + (f"; compute capability below {CAPABILITY}" if weak else "")
    elif driver.gpus and not torch.problem:
        built = f"built for CUDA {torch.cuda}" if torch.cuda else "a CPU build"
        found = f"the driver shows {counted(list(driver.gpus))}, torch none: {built}"
    else:
        found = f"the driver shows {counted(list(driver.gpus))}" if driver.gpus else "none"
    fix = "srun --gpus=1 eureka doctor (or log in to a node with NVIDIA GPUs of the A100's generation or newer)"
    if driver.gpus and not names:
        fix = (
            "unset CUDA_VISIBLE_DEVICES, or see the row of the driver"
            if torch.cuda
            else "make install-gpu VENV=.venv-gpu"
        )
    return Finding(
        "CUDA devices",
        ("limited" if weak else "present") if names else "absent",
        found,
        required=False,
        lost="bf16 flash attention, which training needs"
        if weak
        else "training runs on the CPU with gloo: right for the demo and for tests, not for 3B and more",
        fix=fix,
    )


def _pinned(kind: Kind) -> Finding:
    pinned = pins(kind)
    problems = differences(pinned)
    if not pinned:
        problems, found = ["unknown"], "unknown: eureka-megatron is not installed"
    elif problems:
        found = f"{len(problems)} of {len(pinned)} differ from requirements/{kind}.txt: {shortened(problems)}"
    else:
        found = f"all {len(pinned)} of requirements/{kind}.txt"
    return Finding(
        "pinned versions",
        "limited" if problems else "present",
        found,
        required=False,
        lost="the set of versions that was tested together",
        fix=install_pins(kind),
    )


def counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
