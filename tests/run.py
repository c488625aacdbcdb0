"""The whole test-suite as `make test` runs it: fast tests first, offline, one thread a process.

    python tests/run.py                      everything
    python tests/run.py -x -k packing        any arguments of pytest
    python tests/run.py tests/unit           any paths

Everything runs in two parts: unit and parity, file by file on two workers, then one by one what starts many processes of its own. The order within
a part is set in conftest.py. Every skip is printed with its reason, as are the slowest tests; the exit code is pytest's, so it is 0 only
when something ran and nothing failed.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")
    # With either, pytest compares long values line by line: a tensor as lists outlasts the timeout, which then hides what failed.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)  # instead of tests/, so that `tests.helpers` is importable
    import pytest

    def run(*words: str) -> int:
        return int(pytest.main(["-p", "no:cacheprovider", "-rfEsxX", "--durations=20", *words]))

    if arguments:
        return run(*arguments)
    first = run("-q", "-n", "2", "--dist", "loadfile", "tests/unit", "tests/parity")
    second = run("-q", "tests/dist", "tests/system", "tests/gpu")
    return first or second


if __name__ == "__main__":  # the ranks' processes import this file again
    raise SystemExit(main(sys.argv[1:]))
