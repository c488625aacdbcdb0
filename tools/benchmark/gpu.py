"""Throughput of the policy's parts on one GPU, in the shapes of the 3B and the 7B model, and the share of the GPU's peak that is (MFU).

    python tools/benchmark/gpu.py [--sizes 3b 7b] [--sequences 1024 4096 8192] [--backend local|te] [--fp8 hybrid] [--only TEXT] [--json FILE]

Parts: the variable-length attention kernel; text layers on packed rows, without and with recomputation; the vision tower learning (forward
and backward) and frozen (forward alone); log-probabilities over the vocabulary. Rows are packed from sequences of equal length; pictures
are square. Times are medians, in bf16. Counted are the floating-point operations that the model needs (backward: twice the forward pass;
causal attention: the lower triangle), not those that recomputation or a kernel adds. FP8 runs are compared with the bf16 peak too.
A part that fails is reported with its error and the others go on; the JSON file is written after every part. `--only attention` needs
torch alone, the layers Megatron-Core. `--device cpu --tiny` runs all parts in toy sizes, to try the script itself: its times mean nothing.
Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eureka_megatron.gpus import peak_of
from eureka_megatron.layout import Execution

if TYPE_CHECKING:
    from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel

WINDOW = 64  # patches of an attention window: 8 × 8


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


@dataclass(frozen=True)
class Size:
    """A model: a few of its equal layers, its tower's, and its vocabulary."""

    text: Tower
    vision: Tower
    vocabulary: int


# Eight of the tower's 32 blocks, one of which attends to whole frames; four of the 36 (3B) or 28 (7B) text layers.
VISION = Tower(heads=16, groups=16, size=80, hidden=1280, ffn=3420, layers=8)
SIZES = {
    "3b": Size(Tower(heads=16, groups=2, size=128, hidden=2048, ffn=11008, layers=4), VISION, 151936),
    "7b": Size(Tower(heads=28, groups=4, size=128, hidden=3584, ffn=18944, layers=4), VISION, 152064),
}
TINY = Size(
    Tower(heads=4, groups=2, size=16, hidden=64, ffn=96, layers=2),
    Tower(heads=2, groups=2, size=16, hidden=32, ffn=48, layers=3),
    1024,
)

# Work to time, the operations of its forward pass, and what its rows are counted by.
Work = tuple[Callable[[], None], float]


@dataclass(frozen=True)
class Case:
    """One row of the report. `passes`: 3 with the backward pass, 1 without."""

    part: str
    size: str
    shape: str
    rows: int
    prepare: Callable[[], Work]
    passes: int = 3


def seconds(run: Callable[[], None], repetitions: int = 20, warmup: int = 3, limit: float = 6.0) -> float:
    """Median of one run, after warming up; fewer repetitions when they would take longer than `limit` seconds."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[float] = []
    start = time.perf_counter()
    for number in range(warmup + repetitions):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        if number >= warmup:
            times.append(time.perf_counter() - begin)
        if times and time.perf_counter() - start > limit:
            break
    return sorted(times)[len(times) // 2]


def figures(duration: float, flops: float, rows: int) -> dict[str, float]:
    return {
        "milliseconds": round(1000 * duration, 3),
        "tflops": round(flops / duration / 1e12, 1),
        "rows_per_second": round(rows / duration),
    }


def cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def attention(tower: Tower, lengths: list[int], device: torch.device, *, causal: bool) -> Work:
    """Forward and backward of one call of the variable-length kernel (on a CPU, which has none, of torch's attention a segment)."""
    rows, longest, cu = sum(lengths), max(lengths), cumulative(lengths, device)
    query, key, value = (
        torch.randn(rows, heads, tower.size, device=device, dtype=precision(device), requires_grad=True)
        for heads in (tower.heads, tower.groups, tower.groups)
    )
    gradient = torch.randn_like(query)

    def call() -> torch.Tensor:
        if device.type == "cuda":
            from eureka_megatron.models.qwen2_5_vl.varlen import Spans, varlen_attention

            spans = Spans(cu, longest)
            return varlen_attention(query, key, value, spans, spans, causal=causal)
        queries, keys, values = (x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value))
        parts = zip(queries, keys, values, strict=True)
        scaled = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([scaled(q, k, v, is_causal=causal, enable_gqa=True) for q, k, v in parts], dim=1).transpose(
            0, 1
        )

    def run() -> None:
        torch.autograd.grad(call(), (query, key, value), gradient)

    return run, tower.attention_flops(lengths, causal=causal)


def logprobs(size: Size, tokens: int, device: torch.device, *, learns: bool) -> Work:
    """Log-probabilities of taken tokens from hidden states and the whole output weight."""
    from eureka_megatron.rl.logprobs import token_logprobs

    hidden, weight = (
        (torch.randn(rows, size.text.hidden, device=device) * 0.02).to(precision(device)).requires_grad_(learns)
        for rows in (tokens, size.vocabulary)
    )
    labels = torch.randint(size.vocabulary, (tokens,), device=device)

    def run() -> None:
        values, _ = token_logprobs(hidden, weight, labels)
        if learns:
            torch.autograd.grad(values.sum(), (hidden, weight))

    return run, 2.0 * tokens * size.text.hidden * size.vocabulary


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(text: Tower, vision: Tower, rendezvous: Path, execution: Execution) -> QwenVLModel:
    """One chunk with these towers and random weights."""
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
    [model] = build_model(config, parallel, execution)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def text_layers(model: QwenVLModel, tower: Tower, lengths: list[int]) -> Work:
    """Forward and backward of all text layers on one packed row, and the operations of the forward pass."""
    from eureka_megatron.models.qwen2_5_vl.attention import Segments
    from eureka_megatron.models.qwen2_5_vl.rope import Rotation, text_angles

    weight, rows, text = model.embedding.word_embeddings.weight, sum(lengths), model.hf_config.text_config
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1).to(weight.device)
    rotation = Rotation.of(text_angles(positions, text.head_dim, text.rope_theta, text.mrope_section), weight.dtype)
    hidden = torch.randn(rows, 1, tower.hidden).to(weight).requires_grad_()
    gradient = torch.randn_like(hidden)
    # Made once, as all layers of a micro-batch share it; its lengths are known, so nothing asks the device for them.
    segments = Segments(cumulative(lengths, weight.device), rotation, lengths_B=tuple(lengths))

    def run() -> None:
        out = model.decoder(hidden, attention_mask=None, packed_seq_params=segments)
        out.backward(gradient)

    return run, tower.layers * (tower.linear_flops(rows) + tower.attention_flops(lengths, causal=True))


def vision_layers(model: QwenVLModel, tower: Tower, frames: list[int], *, learns: bool = True) -> Work:
    """Patch embedding and blocks on pictures of so many patches, forward and (where it learns) backward, and the operations of the blocks'
    forward pass."""
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
        windows=tuple(windows),
        frames=tuple(frames),
    )
    gradient = torch.randn(rows, 1, tower.hidden).to(weight)

    def run() -> None:
        with torch.set_grad_enabled(learns):
            hidden = model.vision.encode(batch)
        if learns:
            hidden.backward(gradient)

    attention_flops = (tower.layers - 1) * tower.attention_flops(windows, causal=False)
    attention_flops += tower.attention_flops(frames, causal=False)
    return run, tower.layers * tower.linear_flops(rows) + attention_flops


def cases(options: argparse.Namespace, device: torch.device, rendezvous: Path) -> Iterator[Case]:
    """What is measured, the kernels before the layers made of them."""
    sizes = {"tiny": TINY} if options.tiny else {name: SIZES[name] for name in options.sizes}
    packs = [[length] * (options.tokens // length) for length in options.sequences]

    def model(size: Size, recompute: str) -> QwenVLModel:
        dtype = str(precision(device)).removeprefix("torch.")
        chosen = {"backend": options.backend, "fp8": options.fp8, "fp8_recipe": options.fp8_recipe}
        return build(size.text, size.vision, rendezvous, Execution(dtype=dtype, recompute=recompute, **chosen))

    def text(size: Size, lengths: list[int], recompute: str) -> Callable[[], Work]:
        return lambda: text_layers(model(size, recompute), size.text, lengths)

    def kernel(tower: Tower, lengths: list[int], causal: bool) -> Callable[[], Work]:
        return lambda: attention(tower, lengths, device, causal=causal)

    for name, size in sizes.items():
        for lengths in packs:
            shape = f"{len(lengths)} × {lengths[0]} tokens"
            yield Case("text attention", name, shape, sum(lengths), kernel(size.text, lengths, True))
            yield Case("text layers", name, shape, sum(lengths), text(size, lengths, "none"))
        lengths = packs[len(packs) // 2]
        for recompute in ("selective", "full"):
            shape = f"{len(lengths)} × {lengths[0]} tokens"
            yield Case(f"text layers, recompute {recompute}", name, shape, sum(lengths), text(size, lengths, recompute))
        tokens = options.tokens // 2
        for learns, passes in ((False, 1), (True, 3)):
            part = "log-probabilities, " + ("forward and backward" if learns else "forward")
            work = partial(logprobs, size, tokens, device, learns=learns)
            yield Case(part, name, f"{tokens} tokens × {size.vocabulary} words", tokens, work, passes)

    name, size = next(iter(sizes.items()))
    frames = [options.patches] * max(1, options.tokens // options.patches)
    windows, shape = [WINDOW] * (sum(frames) // WINDOW), f"{len(frames)} × {options.patches} patches"
    for part, lengths in (("windows", windows), ("frames", frames)):
        yield Case(f"vision attention, {part}", "all", shape, sum(frames), kernel(size.vision, lengths, False))
    for part, recompute, learns in (
        ("learning", "none", True),
        ("learning, recompute full", "full", True),
        ("frozen", "none", False),
    ):

        def tower(recompute: str = recompute, learns: bool = learns) -> Work:
            return vision_layers(model(size, recompute), size.vision, frames, learns=learns)

        yield Case(f"vision tower, {part}", "all", shape, sum(frames), tower, 3 if learns else 1)


def measure(case: Case, device: torch.device, peak: float | None) -> dict[str, Any]:
    """The row of one case; its error when it fails, out of memory for instance."""
    row: dict[str, Any] = {"part": case.part, "size": case.size, "shape": case.shape}
    on_gpu = device.type == "cuda"
    if on_gpu:
        gc.collect()  # a model's modules refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run, forward_flops = case.prepare()
        row |= figures(seconds(run), case.passes * forward_flops, case.rows)
    except Exception as error:
        return row | {"error": (f"{type(error).__name__}: {error}".splitlines() or ["failed"])[0][:300]}
    if on_gpu:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row | ({"mfu": round(row["tflops"] / peak, 4)} if peak else {})


def line(row: dict[str, Any]) -> str:
    name = f"  {row['part']:<42} {row['size']:<5} {row['shape']:<30}"
    if "error" in row:
        return f"{name} failed: {row['error']}"
    share = f" {row['mfu']:6.1%} of peak" if "mfu" in row else ""
    memory = f" {row['peak_gib']:7.2f} GiB" if "peak_gib" in row else ""
    return f"{name}{row['milliseconds']:10.2f} ms {row['tflops']:7.1f} TFLOP/s{share}{memory}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=16384, help="rows of a micro-batch")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens of packed sequences"
    )
    parser.add_argument("--patches", type=int, default=4096, help="of a picture: a multiple of 64 and a square")
    parser.add_argument("--backend", choices=("local", "te"), default="local")
    parser.add_argument("--fp8", choices=("none", "hybrid", "e4m3"), default="none")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise"), default="delayed")
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name holds this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try this script")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no part after so long")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak, where the device is not known")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.sequences, options.patches = 256, [32, 64, 128], 256
    elif options.device == "cpu":
        parser.error("--device cpu is for trying the script: give --tiny too")
    return options


def main() -> int:
    options = arguments()
    begin = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no GPU is visible to torch; this benchmark measures GPU kernels", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = options.peak_tflops or peak_of(name)
    print(f"{name}, torch {torch.__version__}, {options.tokens} rows; peak {peak or 'unknown (--peak-tflops)'}")
    parts: list[dict[str, Any]] = []
    report = {"device": name, "torch": torch.__version__, "peak_tflops": peak, "complete": False, "parts": parts}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options, device, Path(folder) / "rendezvous"):
            if options.only not in case.part:
                continue
            if time.monotonic() - begin > options.seconds:
                print(f"  {options.seconds:g} seconds are over: the rest is left out")
                break
            parts.append(measure(case, device, peak))
            print(line(parts[-1]), flush=True)
            write(options.json, report)
        else:
            report["complete"] = True
    write(options.json, report)
    return 0 if report["complete"] and not any("error" in row for row in parts) else 1


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
