"""Makes gpu_check.json and gpu_check.md of what tools/gpu_check.sh left in its folder. Needs the standard library alone.

    python tools/gpu_report.py DIR [--commit NAME]

Reads parts.tsv (part, exit code, seconds), tests.jsonl (see tests/gpu/conftest.py) and benchmark.json (see tools/benchmark/gpu.py); what is
missing is reported as such. Exit code 0: every part ended with 0.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "vllm", "ray", "numpy")
# What the exit code of a part means; timeout(1) ends with 124, or with 137 where it had to kill.
MEANING = {0: "ok", 124: "out of time", 137: "out of time"}


def answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str | None:
    name = answer("git", "rev-parse", "--short=12", "HEAD")
    changed = answer("git", "status", "--porcelain", "--untracked-files=no")
    return f"{name} with changes" if name and changed else name


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect(folder: Path, commit_name: str | None) -> dict[str, Any]:
    """Everything, as it goes into gpu_check.json."""
    parts = [line.split("\t") for line in _lines(folder / "parts.tsv")]
    benchmark = folder / "benchmark.json"
    return {
        "commit": commit_name or commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": answer("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        or "no GPU",
        "versions": versions(),
        "parts": [
            {"part": name, "result": MEANING.get(int(code), f"exit code {code}"), "seconds": int(seconds)}
            for name, code, seconds in parts
        ],
        "tests": [json.loads(line) for line in _lines(folder / "tests.jsonl")],
        "benchmark": json.loads(benchmark.read_text(encoding="utf-8")) if benchmark.is_file() else None,
    }


def markdown(found: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# GPU check", "", f"{found['device']}; commit {found['commit']}; {found['date']}; {known}", ""]
    lines += _table(("part", "result", "seconds"), [tuple(part.values()) for part in found["parts"]])
    counts = [test["result"] for test in found["tests"]]
    summary = ", ".join(f"{counts.count(result)} {result}" for result in dict.fromkeys(counts)) or "none ran"
    lines += ["", f"## Tests: {summary}", ""]
    rows = [
        (test["test"].removeprefix("tests/gpu/"), test["result"], test["seconds"], "; ".join(_words(test)))
        for test in found["tests"]
    ]
    lines += _table(("test", "result", "seconds", "measured, or why"), rows)
    benchmark = found["benchmark"] or {"parts": [], "complete": False}
    lines += ["", "## Benchmark" + ("" if benchmark["complete"] else " (incomplete)"), ""]
    lines += _table(
        ("part", "size", "shape", "ms", "TFLOP/s", "of peak", "peak GiB"), map(_figures, benchmark["parts"])
    )
    return "\n".join(lines) + "\n"


def _figures(row: dict[str, Any]) -> tuple[Any, ...]:
    head = (row["part"], row["size"], row["shape"])
    if "error" in row:
        return (*head, f"failed: {row['error']}", "", "", "")
    share = f"{row['mfu']:.1%}" if "mfu" in row else ""
    return (*head, row["milliseconds"], row["tflops"], share, row.get("peak_gib", ""))


def _words(test: dict[str, Any]) -> list[str]:
    return [test["reason"]] if "reason" in test else test["printed"]


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", help="where the tree is no git checkout")
    options = parser.parse_args()
    found = collect(options.folder, options.commit)
    (options.folder / "gpu_check.json").write_text(
        json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (options.folder / "gpu_check.md").write_text(markdown(found), encoding="utf-8")
    failed = [part["part"] for part in found["parts"] if part["result"] != "ok"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
