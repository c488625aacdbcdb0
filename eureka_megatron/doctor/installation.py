"""What is installed here, what requirements/ pins, and the commands that bring the one to the other. Needs the standard library alone.

The pins are read from requirements/ where the package runs from a checkout, and otherwise from its own metadata: setup.py makes the
extras `cpu` and `gpu` out of the same files, so there is no second list.
"""

import importlib.metadata
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

Kind = Literal["cpu", "gpu"]  # requirements/cpu.txt (Python 3.11) or gpu.txt (Python 3.12)
PACKAGE = "eureka-megatron"
CHECKOUT = Path(__file__).resolve().parents[2]
SHOWN = 4  # packages named one by one


def installed(name: str) -> str | None:
    """Version of a distribution, from its metadata; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(kind: Kind) -> dict[str, str]:
    """Name → version. Empty where the package is neither a checkout nor installed."""
    path = CHECKOUT / "requirements" / f"{kind}.txt"
    if path.is_file():
        lines, pattern = path.read_text(encoding="utf-8").splitlines(), r"([\w.-]+)==(\S+)"
    else:
        try:
            lines = importlib.metadata.requires(PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
        pattern = rf"""([\w.-]+)==([^\s;]+)\s*;\s*extra == ["']{kind}["']"""
    return {match[1]: match[2] for line in lines if (match := re.fullmatch(pattern, line))}


def differences(pinned: dict[str, str]) -> list[str]:
    """Packages that are missing or at another version. A pin without a local part accepts any: 2.13.0 is met by 2.13.0+cu130."""
    problems = []
    for name, pin in pinned.items():
        version = installed(name)
        if version is None:
            problems.append(f"{name} missing (pinned {pin})")
        elif version != pin and version.partition("+")[0] != pin:
            problems.append(f"{name} {version} (pinned {pin})")
    return problems


def shortened(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    return ", ".join(problems[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def pip(arguments: str) -> str:
    """pip of the interpreter that runs, as a command to copy. Example: ".venv/bin/python -m pip install ray==2.60.0"."""
    return f"{shlex.quote(_shown(Path(sys.executable)))} -m pip {arguments}"


def install_pins(kind: Kind) -> str:
    """Bring all packages to their pins."""
    path = CHECKOUT / "requirements" / f"{kind}.txt"
    if not path.is_file():
        return pip(f"install '{PACKAGE}[{kind}]'")
    # The CPU set leaves out what its packages declare and a CPU torch cannot load.
    return pip(f"install {'--no-deps ' if kind == 'cpu' else ''}-r {shlex.quote(_shown(path))}")


def install_one(name: str, kind: Kind) -> str:
    pin = pins(kind).get(name)
    return pip(f"install {name}=={pin}" if pin else f"install {name}")


def _shown(path: Path) -> str:
    """Relative where it lies below the present directory."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
