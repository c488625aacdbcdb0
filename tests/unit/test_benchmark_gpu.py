"""What the GPU benchmark counts is what torch counts, and without a GPU it says so. Its times come from hardware only."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eureka_megatron.layout import Execution
from tests.helpers.ranks import run_ranks

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark" / "gpu.py"


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def counted(rank: int, folder: str) -> dict[str, tuple[float, float]]:
    """For both towers: the operations of one forward and backward pass, as the benchmark and as torch count them."""
    gpu = benchmark()
    text = gpu.Tower(heads=4, groups=2, size=16, hidden=64, ffn=96, layers=2)
    vision = gpu.Tower(heads=2, groups=2, size=16, hidden=32, ffn=48, layers=3)
    model = gpu.build(text, vision, Path(folder) / "rendezvous", Execution())
    found = {}
    for name, stack, tower, lengths in (
        ("text", gpu.text_layers, text, [32, 32]),
        ("vision", gpu.vision_layers, vision, [256, 256]),
    ):
        run, flops = stack(model, tower, lengths)
        with FlopCounterMode(display=False) as counter:
            run()
        if name == "text":  # attention written out on a CPU computes the upper triangle too
            extra = 3 * tower.layers * tower.attention_flops(lengths, causal=True)
        else:  # the patch embedding, whose input needs no gradient
            extra = 2 * 2 * sum(lengths) * model.vision.patch_embed.weight.numel()
        found[name] = (3 * flops + extra, counter.get_total_flops())
    return found


def test_operations_are_counted_right(tmp_path: Path) -> None:
    for name, (ours, theirs) in run_ranks(counted, 1, str(tmp_path))[0].items():
        assert ours == pytest.approx(theirs, rel=1e-3), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: no GPU is visible to torch; this benchmark measures GPU kernels"]


def test_every_part_runs_on_a_cpu_in_toy_sizes(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["complete"]
    parts = {row["part"] for row in report["parts"]}
    for wanted in ("text attention", "text layers", "recompute full", "log-probabilities", "learning", "frozen"):
        assert any(wanted in part for part in parts), wanted
    assert all(f"  {row['part']} " in done.stdout for row in report["parts"])


def test_without_time_nothing_starts_and_the_report_says_it_is_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--json", path, "--seconds", "0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert json.loads(path.read_text())["complete"] is False
    assert json.loads(path.read_text())["parts"] == []


def test_a_part_that_fails_is_a_row_with_its_error() -> None:
    gpu = benchmark()

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    row = gpu.measure(gpu.Case("text layers", "7b", "4 × 4096 tokens", 16384, fail), torch.device("cpu"), None)
    assert row["error"] == "OutOfMemoryError: CUDA out of memory."
    assert "failed: OutOfMemoryError" in gpu.line(row)


def test_operations_of_log_probabilities_are_counted_right() -> None:
    gpu = benchmark()
    size = gpu.Size(gpu.TINY.text, gpu.TINY.vision, 512)
    for learns, passes in ((False, 1), (True, 4)):  # the backward pass computes the logits again
        run, flops = gpu.logprobs(size, 32, torch.device("cpu"), learns=learns)
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == passes * flops


def test_the_median_is_bounded_in_time() -> None:
    gpu = benchmark()
    calls = []
    assert gpu.seconds(lambda: calls.append(1), repetitions=5, warmup=2) < 1
    assert len(calls) == 7
    calls.clear()
    gpu.seconds(lambda: calls.append(1), repetitions=5, warmup=2, limit=0.0)
    assert len(calls) == 3  # the warm-up and one that counts
