"""Attention and layer throughput in the 3B model's shapes on one GPU, and the share of the GPU's peak that is (MFU).

    python tools/benchmark/gpu.py [--tokens 16384] [--sequence 2048] [--backend local|te] [--fp8 hybrid] [--recompute full] [--json FILE]

Rows are packed from sequences of equal length; pictures are square. Times are medians over repetitions of forward plus backward, in bf16.
Counted are the floating-point operations that the model needs (backward: twice the forward pass; causal attention: the lower triangle), not
those that recomputation or a kernel adds. FP8 runs are compared with the bf16 peak too. The attention part needs torch alone, the layers
Megatron-Core. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel

WINDOW = 64  # patches of an attention window: 8 × 8
# Dense bf16 tensor-core peak of one GPU, from NVIDIA's data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362}


@dataclass(frozen=True)
class Tower:
    """A stack of equal layers."""

    heads: int
    groups: int  # key-value heads
    size: int  # of a head
    hidden: int
    ffn: int
    layers: int

    def linear_flops(self, rows: int) -> float:
        """One layer, forward: fused qkv, projection, gate and up, down; two operations a multiply-add."""
        inner = self.heads * self.size
        qkv = inner + 2 * self.groups * self.size
        return 2.0 * rows * self.hidden * (qkv + inner + 3 * self.ffn)

    def attention_flops(self, lengths: list[int], *, causal: bool) -> float:
        """One layer, forward: scores and weighted values."""
        pairs = sum(length**2 for length in lengths) / (2 if causal else 1)
        return 4.0 * self.heads * self.size * pairs


TEXT = Tower(heads=16, groups=2, size=128, hidden=2048, ffn=11008, layers=4)  # Qwen2.5-VL-3B, four of 36 layers
VISION = Tower(
    heads=16, groups=16, size=80, hidden=1280, ffn=3420, layers=8
)  # eight of 32: one attends to whole frames


def seconds(run: Callable[[], None], repetitions: int = 20, warmup: int = 5) -> float:
    """Median of one run, after warming up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(warmup + repetitions):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return sorted(times[warmup:])[repetitions // 2]


def figures(duration: float, forward_flops: float, rows: int) -> dict[str, float]:
    """Of forward and backward together."""
    return {
        "milliseconds": round(1000 * duration, 3),
        "tflops": round(3 * forward_flops / duration / 1e12, 1),
        "rows_per_second": round(rows / duration),
    }


def cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def attention(tower: Tower, lengths: list[int], *, causal: bool) -> dict[str, float]:
    """One call of the variable-length kernel."""
    from eureka_megatron.models.qwen2_5_vl.varlen import varlen_attention

    rows, longest, cu = sum(lengths), max(lengths), cumulative(lengths, torch.device("cuda"))
    query, key, value = (
        torch.randn(rows, heads, tower.size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (tower.heads, tower.groups, tower.groups)
    )
    gradient = torch.randn_like(query)

    def run() -> None:
        out = varlen_attention(query, key, value, cu, cu, longest, longest, causal=causal)
        torch.autograd.grad(out, (query, key, value), gradient)

    return figures(seconds(run), tower.attention_flops(lengths, causal=causal), rows)


def build(text: Tower, vision: Tower, rendezvous: Path, **options: Any) -> QwenVLModel:
    """One chunk with these towers and random weights. `options` are those of `build_model`."""
    from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, TextConfig, VisionConfig
    from eureka_megatron.models.qwen2_5_vl.model import build_model
    from eureka_megatron.parallel.runtime import init_parallel

    side = (text.size // 2 - text.size // 8) // 2
    config = QwenVLConfig(
        text_config=TextConfig(
            hidden_size=text.hidden,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.groups,
            intermediate_size=text.ffn,
            vocab_size=1024,  # embedding and head are not measured
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(text.size // 2 - 2 * side, side, side),
            max_position_embeddings=128000,
        ),
        vision_config=VisionConfig(
            depth=vision.layers,
            hidden_size=vision.hidden,
            num_heads=vision.heads,
            intermediate_size=vision.ffn,
            out_hidden_size=text.hidden,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(vision.layers - 1,),
            tokens_per_second=2.0,
        ),
        tie_word_embeddings=False,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    parallel = init_parallel(init_method=f"file://{rendezvous}")
    [model] = build_model(config, parallel, **options)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def text_layers(model: QwenVLModel, tower: Tower, lengths: list[int]) -> tuple[Callable[[], None], float]:
    """Forward and backward of all text layers on one packed row, and the operations of the forward pass."""
    from eureka_megatron.models.qwen2_5_vl.attention import Segments
    from eureka_megatron.models.qwen2_5_vl.rope import Rotation, text_angles

    weight, rows, text = model.embedding.word_embeddings.weight, sum(lengths), model.hf_config.text_config
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1).to(weight.device)
    rotation = Rotation.of(text_angles(positions, text.head_dim, text.rope_theta, text.mrope_section), weight.dtype)
    hidden = torch.randn(rows, 1, tower.hidden).to(weight).requires_grad_()
    gradient = torch.randn_like(hidden)
    cu_seqlens = cumulative(lengths, weight.device)

    def run() -> None:
        out = model.decoder(hidden, attention_mask=None, packed_seq_params=Segments(cu_seqlens, rotation))
        out.backward(gradient)

    return run, tower.layers * (tower.linear_flops(rows) + tower.attention_flops(lengths, causal=True))


def vision_layers(model: QwenVLModel, tower: Tower, frames: list[int]) -> tuple[Callable[[], None], float]:
    """Forward and backward of patch embedding and blocks on pictures of so many patches, and the operations of the blocks' forward pass."""
    from eureka_megatron.types import VisionBatch

    weight, rows, windows = model.vision.patch_embed.weight, sum(frames), [WINDOW] * (sum(frames) // WINDOW)
    sides = [torch.arange(int(patches**0.5)) for patches in frames]
    nowhere = torch.zeros(0, dtype=torch.int64)
    batch = VisionBatch(
        patches_PD=torch.randn(rows, weight.shape[1]).to(weight),
        coordinates_P2=torch.cat([torch.cartesian_prod(side, side) for side in sides]).to(weight.device),
        cu_windows=cumulative(windows, weight.device),
        cu_frames=cumulative(frames, weight.device),
        units=rows // 4,
        source_E=nowhere,
        placement_E=nowhere,
    )
    gradient = torch.randn(rows, 1, tower.hidden).to(weight)

    def run() -> None:
        model.vision.encode(batch).backward(gradient)

    attention_flops = (tower.layers - 1) * tower.attention_flops(windows, causal=False)
    attention_flops += tower.attention_flops(frames, causal=False)
    return run, tower.layers * tower.linear_flops(rows) + attention_flops


def measure(options: argparse.Namespace, rendezvous: Path) -> dict[str, dict[str, float]]:
    lengths = [options.sequence] * (options.tokens // options.sequence)
    frames = [options.patches] * max(1, options.tokens // options.patches)
    windows = [WINDOW] * (sum(frames) // WINDOW)
    report = {
        "text attention": attention(TEXT, lengths, causal=True),
        "vision attention, windows": attention(VISION, windows, causal=False),
        "vision attention, frames": attention(VISION, frames, causal=False),
    }
    if options.attention_only:
        return report
    chosen = {name: getattr(options, name) for name in ("backend", "recompute", "fp8", "fp8_recipe")}
    model = build(TEXT, VISION, rendezvous, dtype=torch.bfloat16, **chosen)
    for name, stack, tower, rows in (
        ("text layers", text_layers, TEXT, lengths),
        ("vision blocks", vision_layers, VISION, frames),
    ):
        run, flops = stack(model, tower, rows)
        torch.cuda.reset_peak_memory_stats()
        found = figures(seconds(run), flops, sum(rows))
        report[name] = found | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="rows of a micro-batch")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of each packed sequence")
    parser.add_argument("--patches", type=int, default=4096, help="of a picture: a multiple of 64 and a square")
    parser.add_argument("--backend", choices=("local", "te"), default="local")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--fp8", choices=("none", "hybrid", "e4m3"), default="none")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise"), default="delayed")
    parser.add_argument("--attention-only", action="store_true", help="needs no Megatron-Core")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak, where the device is not known")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU is visible to torch; this benchmark measures GPU kernels", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name()
    peak = options.peak_tflops or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
    print(f"{device}, torch {torch.__version__}, {options.tokens} rows; peak {peak or 'unknown (--peak-tflops)'}")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(folder) / "rendezvous")
    for name, found in report.items():
        share = f"{found['tflops'] / peak:7.1%} of peak" if peak else ""
        memory = f"  {found['peak_gib']} GiB" if "peak_gib" in found else ""
        print(f"  {name:<26}{found['milliseconds']:9.2f} ms {found['tflops']:8.1f} TFLOP/s {share}{memory}")
    if options.json:
        options.json.write_text(json.dumps({"device": device, "peak_tflops": peak, **report}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
