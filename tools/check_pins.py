"""Do the pins still install? pip resolves requirements/cpu.txt and gpu.txt, each with the Python it is for; nothing is installed.

    python tools/check_pins.py [--cpu-python PATH] [--gpu-python PATH]

Run by hand before a release: it needs the network, both interpreters (python3.11 and python3.12 on PATH, unless said otherwise), and a
minute a file. A file resolves when pip accepts all of its pins together and would install nothing that it does not name, nor another
build of what it names. cpu.txt is installed with --no-deps, because some things that its packages declare must stay away (LEFT_OUT):
for it, resolving means that those are all that pip would add. Its torch is the CPU build, so the index that pip uses must have that.
Exit code 0: both resolve; 1: one does not, or could not be tried.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
PYTHON = {"cpu.txt": "3.11", "gpu.txt": "3.12"}
LEFT_OUT = {
    "cpu.txt": {
        "setuptools",  # `make install` puts it in first: the package is built with it
        "torchaudio",  # only a CUDA build is published, which does not load beside a CPU torch, and nothing needs it
        "torchcodec",  # the same
    },
    "gpu.txt": set(),
}
SECONDS = 900


@dataclass(frozen=True)
class Resolution:
    """What pip said about one file.

    Example: Resolution(environment="Python 3.12.1, pip 23.2.1", packages={"torch": "2.13.0"}, sources=(), conflicts=()).
    """

    environment: str
    packages: dict[str, str]  # what pip would install: normalised name → version
    sources: tuple[str, ...]  # those that come as source and would be built
    conflicts: tuple[str, ...]  # why it would not, in pip's words


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Normalised name → version of a requirements file.

    Raises ValueError with the line that is not `name==version`, and for a name that stands there twice.
    """
    pins: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;*]+)", line.strip())
        if match is None:
            raise ValueError(f"not an exact pin: {line!r}, expected name==version")
        if normalised(match[1]) in pins:
            raise ValueError(f"pinned twice: {match[1]}")
        pins[normalised(match[1])] = match[2]
    return pins


def read_report(report: dict[str, Any]) -> Resolution:
    """From the JSON that `pip install --report` writes."""
    packages, sources = {}, []
    for entry in report["install"]:
        name = normalised(entry["metadata"]["name"])
        packages[name] = entry["metadata"]["version"]
        if not entry["download_info"]["url"].partition("#")[0].endswith(".whl"):
            sources.append(name)
    environment = f"Python {report['environment']['python_full_version']}, pip {report['pip_version']}"
    return Resolution(environment, packages, tuple(sorted(sources)), ())


def read_conflicts(output: str) -> tuple[str, ...]:
    """The lines of pip's output that say which requirements conflict or do not exist; its last error where none do."""
    found, inside = [], False
    for line in output.splitlines():
        if "conflict is caused by:" in line:
            inside = True
        elif inside and line.startswith("    "):
            found.append(line.strip())
        elif inside and line.strip():
            inside = False
        if re.match(r"ERROR: (No matching distribution found for|.*requires a different Python)", line):
            found.append(line.removeprefix("ERROR: "))
    if not found:
        errors = [line for line in output.splitlines() if line.lower().startswith("error: ")]
        found = errors[-1:] or output.strip().splitlines()[-1:] or ["pip failed without a word"]
    return tuple(dict.fromkeys(found))


def judge(pins: dict[str, str], found: Resolution, left_out: set[str]) -> list[str]:
    """What is wrong with a file of these pins; empty when it resolves."""
    if found.conflicts:
        return list(found.conflicts)
    added = sorted(set(found.packages) - set(pins) - left_out)
    moved = sorted(name for name in set(found.packages) & set(pins) if found.packages[name] != pins[name])
    problems = [f"not in the file: {name} {found.packages[name]}" for name in added]
    return problems + [f"{name} is pinned at {pins[name]}, pip takes {found.packages[name]}" for name in moved]


def find_python(version: str) -> str | None:
    """The interpreter `pythonX.Y` on PATH, if it runs and is that version (a pyenv shim may be there and not run)."""
    path = shutil.which(f"python{version}")
    if path is None:
        return None
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([path, "-c", asked], capture_output=True, text=True, check=False)
    return path if done.stdout.strip() == version else None


def resolve(python: str, path: Path) -> Resolution:
    """Ask pip. Raises subprocess.TimeoutExpired after a quarter of an hour."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, "-m", "pip", "--no-input", "install", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-r", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            return Resolution(python, {}, (), read_conflicts(done.stdout + done.stderr))
        return read_report(json.loads(report.read_text(encoding="utf-8")))


def describe(name: str, pins: dict[str, str], found: Resolution, problems: list[str]) -> str:
    """Some lines for people. Example: "requirements/gpu.txt (Python 3.12.1, pip 23.2.1): resolves"."""
    lines = [f"requirements/{name} ({found.environment}): {'does not resolve' if problems else 'resolves'}"]
    if found.packages:
        known = [f"{added} {found.packages[added]}" for added in sorted(set(found.packages) - set(pins))]
        lines.append(f"  pins: {len(pins)}; packages that pip would install: {len(found.packages)}")
        lines.append(
            f"  not pinned: {', '.join(known) or 'none'}; source archives: {', '.join(found.sources) or 'none'}"
        )
    return "\n".join([*lines, *(f"  {problem}" for problem in problems)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, version in PYTHON.items():
        kind = name.removesuffix(".txt")
        parser.add_argument(f"--{kind}-python", metavar="PATH", help=f"the interpreter for {name}, a Python {version}")
    options = vars(parser.parse_args())
    failed = False
    for name, version in PYTHON.items():
        kind = name.removesuffix(".txt")
        python = options[f"{kind}_python"] or find_python(version)
        if python is None:
            print(f"error: no python{version} that runs is on PATH; name it by --{kind}-python", file=sys.stderr)
            failed = True
            continue
        path = REQUIREMENTS / name
        pins = read_pins(path.read_text(encoding="utf-8"))
        found = resolve(python, path)
        problems = judge(pins, found, LEFT_OUT[name])
        print(describe(name, pins, found, problems), flush=True)
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
