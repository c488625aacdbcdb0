"""tools/gpu_check.sh from end to end without a GPU (its tests skip, its benchmark runs in toy sizes), and what it makes of failures."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
TRIED = ("--device", "cpu", "--tiny", "--python", sys.executable, "--commit", "abc123")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run the script itself")


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=300, check=False)


@without_gpu
def test_all_parts_run_and_one_json_and_one_table_come_out(tmp_path: Path) -> None:
    """With a carried wheel: its module is importable in the parts, beside the packages of the interpreter that was named."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as archive:
        info = "carried_along-1.0.dist-info"
        archive.writestr("carried_along.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    done = check(*TRIED, "--wheels", wheels, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "gpu_check.json").read_text())
    assert found["commit"] == "abc123"
    assert found["versions"]["torch"] == torch.__version__
    assert [(part["part"], part["result"]) for part in found["parts"]] == [
        ("install", "ok"),
        ("tests", "ok"),
        ("benchmark", "ok"),
    ]
    assert {test["result"] for test in found["tests"]} == {"skipped"}
    assert all(test["reason"] for test in found["tests"])
    assert found["benchmark"]["complete"]
    assert all(row["milliseconds"] > 0 for row in found["benchmark"]["parts"])
    table = (out / "gpu_check.md").read_text()
    assert "abc123" in table
    assert all(f"| {row['part']} | {row['size']} |" in table for row in found["benchmark"]["parts"])
    assert all(test["test"].removeprefix("tests/gpu/") in table for test in found["tests"])


@without_gpu
def test_a_part_that_fails_or_takes_too_long_keeps_no_other_from_running(tmp_path: Path) -> None:
    """Without --device cpu the benchmark has no GPU and says so; with half a minute in all, the tests are cut off."""
    done = check("--python", sys.executable, "--seconds", "24", "--out", tmp_path)
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    results = {part["part"]: part["result"] for part in found["parts"]}
    assert results.keys() == {"tests", "benchmark"}
    assert results["benchmark"] != "ok"
    assert "benchmark" in done.stderr
    assert "(incomplete)" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--out"], "--out needs a value"),
        (["--fast"], "unknown option --fast; see --help"),
        (["--python", "no-such-python"], "no-such-python not found; name the interpreter that has torch by --python"),
        (["--wheels", "/no/such/folder", "--out", "OUT"], "no wheels in /no/such/folder; make them by --fetch"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], error: str, tmp_path: Path) -> None:
    done = check(*(str(tmp_path) if argument == "OUT" else argument for argument in arguments))
    assert done.returncode == 2
    assert done.stderr == f"error: {error}\n"


def test_help_is_the_head_of_the_script() -> None:
    shown = check("--help").stdout
    assert "--fetch DIR" in shown
    assert "set -" not in shown


def test_the_report_tells_what_failed_and_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "parts.tsv").write_text("install\t0\t3\ntests\t1\t99\nbenchmark\t124\t200\n")
    tests = [
        {"test": "tests/gpu/a.py::b", "result": "passed", "seconds": 1, "printed": ["ours 1e-3", "torch 2e-3"]},
        {"test": "tests/gpu/a.py::c", "result": "failed", "seconds": 2, "reason": "assert 1 | 2", "printed": []},
    ]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    rows = [
        {
            "part": "text layers",
            "size": "7b",
            "shape": "4 × 4096",
            "milliseconds": 5.5,
            "tflops": 400.0,
            "mfu": 0.404,
            "peak_gib": 9.5,
        },
        {"part": "text attention", "size": "7b", "shape": "4 × 4096", "error": "OutOfMemoryError: no"},
    ]
    (tmp_path / "benchmark.json").write_text(json.dumps({"complete": False, "parts": rows}))
    command = [sys.executable, ROOT / "tools" / "gpu_report.py", tmp_path, "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "failed: tests, benchmark\n"
    lines = (tmp_path / "gpu_check.md").read_text().splitlines()
    for line in (
        "| tests | exit code 1 | 99 |",
        "| benchmark | out of time | 200 |",
        "## Tests: 1 passed, 1 failed",
        "| a.py::b | passed | 1 | ours 1e-3; torch 2e-3 |",
        "| a.py::c | failed | 2 | assert 1 \\| 2 |",
        "## Benchmark (incomplete)",
        "| text layers | 7b | 4 × 4096 | 5.5 | 400.0 | 40.4% | 9.5 |",
        "| text attention | 7b | 4 × 4096 | failed: OutOfMemoryError: no |  |  |  |",
    ):
        assert line in lines, line
