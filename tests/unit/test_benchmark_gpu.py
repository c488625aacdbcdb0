"""What the GPU benchmark counts is what torch counts, and without a GPU it says so. Its times come from hardware only."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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
    model = gpu.build(text, vision, Path(folder) / "rendezvous", dtype=torch.float32)
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
