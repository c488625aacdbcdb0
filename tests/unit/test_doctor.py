"""`eureka doctor` tells the truth about this machine, fast, and also where half of the packages are missing."""

import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from eureka_megatron import doctor

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "transformer-engine",
    "apex",
    "flash-attn",
    "opencv",
    "modelopt",
    "NCCL",
    "Slurm",
    "wandb login",
    "CUDA devices",
)
REQUIRED = ("python", "torch", "torchvision import", "megatron-core", "vllm", "ray", "other requirements")


@pytest.fixture(scope="module")
def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def run(*prefix: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`eureka doctor --json` in a process of its own, after `code`."""
    program = f"{code}\nimport sys; from eureka_megatron.cli import main; sys.exit(main(['doctor', '--json']))"
    return subprocess.run(
        [*prefix, sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_everything_required_is_here_and_named_with_its_version(findings):
    assert {name for name, finding in findings.items() if finding.required} == set(REQUIRED)
    assert all(findings[name].status == "present" for name in REQUIRED), findings
    assert findings["torch"].found == version("torch")
    assert findings["megatron-core"].found == version("megatron-core")
    assert findings["ray"].found == version("ray")


def test_every_optional_part_says_what_is_lost_and_how_to_get_it(findings):
    for name in OPTIONAL:
        assert not findings[name].required
        assert len(findings[name].lost) > 10
        assert len(findings[name].fix) > 10
    assert (findings["Slurm"].status == "present") == bool(shutil.which("sbatch") and shutil.which("sinfo"))


def test_gpu_rows_agree_with_torch(findings):
    import torch

    assert (findings["CUDA devices"].status == "present") == torch.cuda.is_available()
    assert (findings["NCCL"].status == "present") == torch.distributed.is_nccl_available()


def test_resources_are_measured(findings):
    assert int(findings["cores"].found) == doctor.usable_cores() >= 1
    assert doctor.usable_memory_bytes() > doctor.GIB
    assert findings["free disk here"].found.endswith("GiB")
    assert findings["/dev/shm"].found.endswith("GiB")


def test_json_is_complete_and_the_exit_code_is_0():
    command = [sys.executable, "-m", "eureka_megatron", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ready"] is True
    assert {"name", "status", "found", "required", "lost", "fix"} == set(report["findings"][0])


def test_the_table_names_every_part_and_gives_advice_only_for_what_is_missing(findings, capsys):
    doctor._print_table(list(findings.values()))
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*OPTIONAL, *REQUIRED))
    assert "Everything required is here." in shown
    assert "\x1b" not in shown
    assert "make install" not in shown  # the fix of parts that are here


def test_a_machine_without_the_packages_is_told_so_and_exits_1(tmp_path):
    """A bare interpreter: no site-packages at all, so no rich, packaging, pydantic either."""
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from eureka_megatron.doctor import run_doctor\n"
        "import eureka_megatron.doctor as d; d.PROBE = 'import no_such_torch'\n"
        "sys.exit(run_doctor())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("torch", "vllm", "megatron-core", "ray"):
        assert f"MISSING {name}:" in done.stdout
    assert "Not ready: torch, torchvision import, megatron-core, vllm, ray, other requirements required." in done.stdout


def test_a_torchvision_that_does_not_load_is_found(monkeypatch):
    """What a torchvision wheel for another torch does: the import raises, torch itself is fine."""
    broken = doctor.PROBE.replace(
        "import torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    assert broken != doctor.PROBE
    monkeypatch.setattr(doctor, "PROBE", broken)
    finding = next(finding for finding in doctor.examine() if finding.name == "torchvision import")
    assert finding.blocks
    assert finding.found == "RuntimeError: operator torchvision::nms does not exist"
    assert "mend_torchvision" in finding.fix


def test_a_torch_import_that_hangs_is_cut_off(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    start = time.monotonic()
    finding = next(finding for finding in doctor.examine() if finding.name == "torch")
    assert finding.blocks
    assert finding.found == "import takes more than 1 s"
    assert time.monotonic() - start < 30


def test_equal_gpus_are_counted():
    assert doctor._counted(["H200 139 GiB", "H200 139 GiB", "L4 22 GiB"]) == "2 × H200 139 GiB, 1 × L4 22 GiB"
