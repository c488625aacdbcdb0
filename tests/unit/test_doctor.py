"""`eureka doctor` tells the truth about this machine, fast, and also where half of the packages are missing."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from eureka_megatron import doctor
from eureka_megatron.doctor import checks, environment, gpu, installation
from eureka_megatron.doctor import machine as resources

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "transformer-engine",
    "apex",
    "opencv",
    "modelopt",
    "NCCL",
    "Slurm",
    "wandb login",
    "CUDA devices",
    "C compiler",
    "NVIDIA driver",
    "pinned versions",
    "TMPDIR",
    "HOME",
    "RAY_ADDRESS",
)
REQUIRED = ("python", "torch", "torchvision import", "megatron-core", "vllm", "ray", "other requirements")


def finding_of(name: str) -> doctor.Finding:
    """One check alone, of a machine without GPUs."""
    machine = gpu.Machine(Path(), gpu.Driver(), gpu.Torch())
    return next(check for check in checks.CHECKS if check.name == name).find(machine)


@pytest.fixture(scope="module")
def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


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
    assert int(findings["cores"].found) == resources.usable_cores() >= 1
    assert resources.usable_memory_bytes() > resources.GIB
    assert findings["free disk here"].found.endswith("GiB")
    assert findings["/dev/shm"].found.endswith("GiB")


def test_tmpdir_is_one_that_can_be_written_with_room(tmp_path, monkeypatch):
    def found() -> doctor.Finding:
        return finding_of("TMPDIR")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert found().status == "present"
    assert found().found.startswith(f"{tmp_path}, ")
    assert "too long a path for Ray's sockets: they go to a shorter one" in found().found  # a note, no fault
    monkeypatch.setattr(environment, "LEAST_FREE", 2**60)
    assert found().status == "limited"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert (found().status, found().found) == ("limited", f"{tmp_path}/absent: does not exist")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    assert found().found == f"{tmp_path}/file: is no folder"
    monkeypatch.setenv("TMPDIR", "/proc")  # nobody may write there, not even root
    assert found().found.startswith("/proc: cannot be written (")


def test_tmpdir_mounted_noexec_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    room = SimpleNamespace(f_flag=os.ST_NOEXEC, f_frsize=2**30, f_bavail=50, f_bfree=50, f_blocks=99)
    monkeypatch.setattr("os.statvfs", lambda path: room)
    assert "mounted noexec" in finding_of("TMPDIR").found


def test_a_home_that_is_absent_or_cannot_be_written_is_told(tmp_path, monkeypatch):
    def found() -> tuple[str, str]:
        row = finding_of("HOME")
        return row.status, row.found

    monkeypatch.setenv("HOME", str(tmp_path))
    assert found() == ("present", str(tmp_path))
    monkeypatch.setenv("HOME", "/nowhere")
    assert found() == ("limited", "/nowhere: does not exist")
    monkeypatch.setenv("HOME", "/proc")
    assert found()[1].startswith("/proc: cannot be written (")
    monkeypatch.delenv("HOME")
    assert found()[1].endswith(": not set")


def test_an_address_of_ray_must_answer(tmp_path, monkeypatch, capsys):
    def found(address: str) -> doctor.Finding:
        monkeypatch.setenv("RAY_ADDRESS", address)
        return finding_of("RAY_ADDRESS")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for fine in ("", "local"):
        assert (found(fine).status, found(fine).required) == ("present", False)
    with socket.socket() as cluster:
        cluster.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        assert "nobody answers" in found(address).found  # bound, but nobody listens
        cluster.listen()
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        for good in (address, f"ray://{address}", "auto"):
            assert (found(good).found, found(good).blocks) == (f"{good}: answers", False)
    assert f"nobody answers at {address}" in found("auto").found  # the file of a cluster that is gone
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    assert found("auto").found == "auto: no cluster runs on this machine"
    for odd in ("head", "head:x", "http://"):
        assert found(odd).blocks
    assert found("192.0.2.1:6379").blocks  # reserved for documentation: no machine has it
    doctor._print_table([found(address)])
    assert "Not ready: RAY_ADDRESS leads nowhere." in capsys.readouterr().out


def test_a_machine_without_a_c_compiler_or_pythons_headers_is_told_so(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = finding_of("C compiler")
    assert (row.status, row.found.partition(";")[0]) == ("absent", "none")
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    row = finding_of("C compiler")
    assert row.status == "limited"
    assert row.found.startswith("clang; no Python.h of Python 3.")
    (tmp_path / "Python.h").write_text("")
    assert finding_of("C compiler").status == "present"


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
    assert "mend_torchvision" not in shown  # the fix of a part that is here


def test_a_machine_without_the_packages_is_told_so_and_exits_1(tmp_path):
    """A bare interpreter: no site-packages at all, so no rich, packaging, pydantic either."""
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from eureka_megatron.doctor import run_doctor\n"
        "import eureka_megatron.doctor.gpu as d; d.PROBE = 'import no_such_torch'\n"
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
    broken = gpu.PROBE.replace("import torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    assert broken != gpu.PROBE
    monkeypatch.setattr(gpu, "PROBE", broken)
    finding = next(finding for finding in doctor.examine() if finding.name == "torchvision import")
    assert finding.blocks
    assert finding.found == "RuntimeError: operator torchvision::nms does not exist"
    assert finding.fix == "python tools/mend_torchvision.py"


def test_a_torch_import_that_hangs_is_cut_off(monkeypatch):
    monkeypatch.setattr(gpu, "PROBE", "import time; time.sleep(1000)")
    monkeypatch.setattr(gpu, "PROBE_SECONDS", 1)
    finding = next(finding for finding in doctor.examine() if finding.name == "torch")
    assert finding.blocks
    assert finding.found == "import takes more than 1 s"


def test_equal_gpus_are_counted():
    assert gpu.counted(["H200 139 GiB", "H200 139 GiB", "L4 22 GiB"]) == "2 × H200 139 GiB, 1 × L4 22 GiB"


# ---- GPU machines, made of an nvidia-smi, a torch and package metadata of the tests' own; `eureka doctor` itself runs unchanged.

H100 = ("NVIDIA H100 80GB HBM3", 9, 0)
TORCH = """
from types import SimpleNamespace as Names
version = Names(cuda={cuda!r})
distributed = Names(is_gloo_available=lambda: True, is_nccl_available=lambda: bool(version.cuda))
cards = [Names(name=name, total_memory=80 * 2**30, major=major, minor=minor) for name, major, minor in {cards!r}]
cuda = Names(is_available=lambda: bool(cards), device_count=lambda: len(cards), get_device_properties=cards.__getitem__,
             nccl=Names(version=lambda: (2, 29, 7)))
"""


class Node:
    """A machine. `driver=None`: no nvidia-smi; `cards` are what torch sees, `shown` what the driver shows."""

    def __init__(self, folder: Path, *, driver: str | None, cuda: str | None, cards: list, shown: int = 0) -> None:
        self.site, self.bin = folder / "site", folder / "bin"
        for path in (self.site / "torch", self.site / "torchvision", self.bin):
            path.mkdir(parents=True)
        (self.site / "torch" / "__init__.py").write_text(TORCH.format(cuda=cuda, cards=cards))
        (self.site / "torchvision" / "__init__.py").write_text("__version__ = '0.28.0'\n")
        if driver is not None:
            rows = "".join(f"{driver}, {H100[0]}\\n" for _ in range(shown or len(cards)))
            self.command("nvidia-smi", f'[ "$1" = --query-gpu=driver_version,name ] && printf "{rows}"')

    def command(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def package(self, name: str, version: str, *needs: str, files: str = "") -> None:
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
        (info / "RECORD").write_text(files)

    def doctor(self, root: Path = ROOT) -> dict[str, dict]:
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": f"{self.site}:{root}"}
        command = [sys.executable, "-m", "eureka_megatron", "doctor", "--json"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.site, env=os.environ | environment, timeout=120
        )
        assert done.stdout, done.stderr
        return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_a_gpu_node_is_judged_by_the_gpu_pins(tmp_path):
    node = Node(tmp_path, driver="580.159.04", cuda="13.0", cards=[H100, H100])
    node.package("torch", "2.13.0+cu130")
    node.package("triton", "3.7.1")
    found = node.doctor()
    assert found["NVIDIA driver"]["status"] == "present"
    assert found["NVIDIA driver"]["found"] == "580.159.04"
    assert found["CUDA devices"]["found"] == "2 × NVIDIA H100 80GB HBM3 80 GiB, CUDA 13.0"
    assert found["NCCL"]["found"] == "2.29.7"
    pinned = found["pinned versions"]["found"]
    assert "requirements/gpu.txt" in pinned
    assert "torch 2.13.0" not in pinned  # met by the CUDA build
    assert "triton" not in pinned
    assert "missing" in pinned  # the CUDA packages, on this machine
    assert found["pinned versions"]["fix"].endswith("-m pip install -r " + str(ROOT / "requirements" / "gpu.txt"))


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="this is Python 3.12")
def test_the_gpu_pins_want_python_3_12(tmp_path):
    row = Node(tmp_path, driver="580.1", cuda="13.0", cards=[H100]).doctor()["python"]
    assert row["status"] == "limited"
    assert row["found"].endswith("the GPU pins are for 3.12")
    assert row["fix"] == "make install-gpu PYTHON=python3.12"


@pytest.mark.parametrize(
    ("driver", "cuda", "needed"),
    [("570.86.15", "13.0", 580), ("570.86.15", "12.8", None), ("515.43", "12.8", 525), ("570.86.15", None, 580)],
)
def test_a_driver_too_old_for_torchs_cuda_is_named_with_the_one_it_needs(tmp_path, driver, cuda, needed):
    """A CPU build of torch is judged by the CUDA of the pins."""
    found = Node(tmp_path, driver=driver, cuda=cuda, cards=[], shown=8).doctor()
    row = found["NVIDIA driver"]
    if needed is None:
        assert (row["status"], row["found"]) == ("present", driver)
    else:
        assert row["status"] == "limited"
        assert row["found"].startswith(f"{driver}, older than {needed}")
        assert row["fix"].startswith(f"sudo apt-get install nvidia-driver-{needed} ")
    built = "a CPU build" if cuda is None else f"built for CUDA {cuda}"
    assert found["CUDA devices"]["found"] == f"the driver shows 8 × {H100[0]}, torch none: {built}"
    assert found["CUDA devices"]["fix"].startswith("make install-gpu" if cuda is None else "unset CUDA_VISIBLE_DEVICES")


def test_a_driver_that_does_not_answer_is_quoted(tmp_path):
    node = Node(tmp_path, driver=None, cuda="13.0", cards=[])
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    node.command("nvidia-smi", f'echo "{words}"; exit 9')
    assert node.doctor()["NVIDIA driver"]["found"] == words


def test_a_gpu_too_old_for_flash_attention_is_named(tmp_path):
    row = Node(tmp_path, driver="580.1", cuda="13.0", cards=[("Tesla V100", 7, 0)]).doctor()["CUDA devices"]
    assert row["status"] == "limited"
    assert row["found"] == "1 × Tesla V100 80 GiB, CUDA 13.0; compute capability below 8.0"
    assert "flash attention" in row["lost"]


def test_the_apex_of_pypi_is_told_from_nvidias(tmp_path):
    node = Node(tmp_path, driver="580.1", cuda="13.0", cards=[H100])
    node.package("apex", "0.9.10", files="apex/__init__.py,,\n")
    row = node.doctor()["apex"]
    assert row["found"] == "0.9.10: PyPI's apex, not NVIDIA's"
    assert row["fix"].endswith("-m pip uninstall apex")
    (node.site / "apex-0.9.10.dist-info" / "RECORD").write_text("apex/optimizers/fused_adam.py,,\n")
    assert node.doctor()["apex"]["status"] == "present"


def test_an_installed_package_reads_the_pins_from_its_own_metadata(tmp_path):
    """No checkout: the extras, which setup.py makes out of requirements/."""
    node = Node(tmp_path, driver="580.1", cuda="13.0", cards=[H100])
    shutil.copytree(ROOT / "eureka_megatron", node.site / "eureka_megatron")
    node.package("torch", "2.13.0")
    needs = ('torch==2.13.0; extra == "gpu"', 'no-such==1.0; extra == "gpu"', 'torch==1.0; extra == "cpu"', "torch>=2")
    node.package("eureka_megatron", "0.1.0", *needs)
    row = node.doctor(node.site)["pinned versions"]
    assert row["found"] == "1 of 2 differ from requirements/gpu.txt: no-such missing (pinned 1.0)"
    assert row["fix"].endswith("-m pip install 'eureka-megatron[gpu]'")


def test_many_differences_are_counted_and_some_named():
    many = [f"p{i} missing" for i in range(9)]
    assert installation.shortened(many) == "p0 missing, p1 missing, p2 missing, p3 missing and 5 more"


def test_every_command_starts_with_a_program(findings):
    """A fix is there to be copied: its first word is something to run, or sets a variable for it."""
    for finding in findings.values():
        word = next(word for word in shlex.split(finding.fix.partition(" (")[0]) if "=" not in word or "." in word)
        known = ("make", "sudo", "srun", "ssh", "sbatch", "wandb", "unset", "python", "run.output=DIR")
        assert word in known or "python" in Path(word).name, finding
