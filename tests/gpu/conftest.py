"""fp32 on GPUs means fp32; and results as they come, so that a run cut short keeps what it saw.

Each test's result goes, as one JSON object a line, into the file that GPU_CHECK_RESULTS names (tools/gpu_check.sh sets it). Example: {"test": "tests/gpu/test_attention.py::test_context_shares", "result": "passed", "seconds": 0.4,
"printed": ["rank 0: ours 3.1e-03, torch 2.9e-03"]}.
"""

import json
import os
from pathlib import Path

import pytest

# Images and users switch TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, set_float32_matmul_precision): 1e-3 where these tests ask for 1e-5.
# cuBLAS and cuDNN read this when they start, in the ranks' processes too, and no setting of torch's overrules it.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("GPU_CHECK_RESULTS")
    if path is None or "tests/gpu/" not in report.nodeid or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid, "result": report.outcome, "seconds": round(report.duration, 2)}
    if report.skipped and isinstance(report.longrepr, tuple):
        row["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        row["reason"] = report.longreprtext.strip().splitlines()[-1] if report.longreprtext else report.when
    printed = [line for line in report.capstdout.splitlines() if line.strip()]
    with Path(path).open("a", encoding="utf-8") as file:
        print(json.dumps(row | {"printed": printed[-20:]}, ensure_ascii=False), file=file)
