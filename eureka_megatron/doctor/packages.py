"""Packages, from their metadata: versions, the pins of requirements/, what setup.py declares, and which apex it is."""

import importlib.metadata
from collections.abc import Callable

from eureka_megatron.doctor.finding import Answer
from eureka_megatron.doctor.gpu import Machine
from eureka_megatron.doctor.installation import PACKAGE, differences, installed, pins, pip, shortened

OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")
NVIDIA_APEX = "git+https://github.com/NVIDIA/apex"


def ask_package(*names: str) -> Callable[[Machine], Answer]:
    """The check of a package that goes by one of these names."""

    def ask(machine: Machine) -> Answer:
        version = next((version for name in names if (version := installed(name))), None)
        return Answer("present" if version else "absent", version or "–")

    return ask


def ask_pinned(machine: Machine) -> Answer:
    pinned, file = pins(machine.kind), f"requirements/{machine.kind}.txt"
    if not pinned:
        return Answer("limited", "unknown: eureka-megatron is not installed")
    if problems := differences(pinned):
        return Answer("limited", f"{len(problems)} of {len(pinned)} differ from {file}: {shortened(problems)}")
    return Answer("present", f"all {len(pinned)} of {file}")


def ask_apex(machine: Machine) -> Answer:
    """The name belongs to another project on PyPI, and Megatron would import that."""
    version = installed("apex")
    files = importlib.metadata.files("apex") or [] if version else []
    if version and not any(str(file).startswith("apex/optimizers/") for file in files):
        return Answer("limited", f"{version}: PyPI's apex, not NVIDIA's", fix=pip("uninstall apex"))
    install = pip(f"install --no-build-isolation {NVIDIA_APEX}")
    fix = f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 {install} (never needed)"
    return Answer("present" if version else "absent", version or "–", fix=fix)


def ask_requirements(machine: Machine) -> Answer:
    """Every other package that setup.py names, and that a partial installation may lack."""
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]
    except ImportError as error:
        if isinstance(error, importlib.metadata.PackageNotFoundError):
            fix = pip("install --no-deps --no-build-isolation --editable .")
            return Answer("absent", f"{PACKAGE} is not installed", fix=fix)
        return Answer("absent", "packaging missing")
    wanted = [
        requirement
        for requirement in declared
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    problems = []
    for requirement in wanted:
        version = installed(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    return Answer("absent" if problems else "present", shortened(problems) or f"all {len(wanted)} met")
