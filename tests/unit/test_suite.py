"""The suite itself: what `make test` runs is everything there is."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_test_file_is_passed_over_in_silence() -> None:
    """pytest leaves out directories with certain names, `dist` among them, unless told otherwise."""
    found = subprocess.run(
        [sys.executable, "tests/run.py", "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    collected = {line.partition("::")[0] for line in found.stdout.splitlines() if "::" in line}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert there - collected == set()
