"""Measures offline conversion against `cp -r` of the same bytes, on a made-up checkpoint of a real model's shapes.

    python tools/benchmark/convert.py --size 3b [--directory DIR] [--workers N] [--json FILE]

Writes random bfloat16 weights (7.5 GB for 3b, 16.6 GB for 7b; three times that much free disk is needed). In each round a conversion follows a
cp of the same source, nothing of either in the page cache; seconds include `sync`. Prints the median over rounds of seconds and of the ratio to
the cp before it, and the peak of anonymous memory over all processes. Deletes everything again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.hf_files import Writer
from eureka_megatron.weights.table import hf_metadata

SHAPES = {
    "tiny": (
        {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        1024,
        4096,
    ),
    "3b": (
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
        11008,
        151936,
    ),
    "7b": (
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        18944,
        152064,
    ),
}
# Of the configuration; a small vocabulary has them at its beginning.
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def make_checkpoint(directory: Path, size: str) -> int:
    """Random weights of the real shapes, written streaming; → bytes."""
    text, ffn, vocab = SHAPES[size]
    depth = {"tiny": 4}.get(size, 32)
    vision = {"depth": depth, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"]}
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    side = 3 * pairs // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]}
    special: dict[str, Any] = {name: place for place, name in enumerate(SPECIAL, start=1)} if vocab < 150000 else {}
    config = Qwen2_5_VLConfig(
        text_config=text | {"intermediate_size": ffn, "vocab_size": vocab, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=size == "3b",
        **special,
        dtype=torch.bfloat16,
    )
    directory.mkdir()
    config.save_pretrained(directory)
    plan = [(name, shape, torch.bfloat16) for name, shape in hf_metadata(read_hf_config(directory))]
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = 0
    with Writer(directory, plan, max_shard_bytes=5 * 10**9) as writer:
        for name, shape, _ in plan:
            count = torch.Size(shape).numel()
            parts = [noise.roll(total + i)[: count - i] for i in range(0, count, len(noise))]
            writer.write(name, torch.cat(parts).view(shape))
            total += count
    return total * 2


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children that no file backs."""
    found = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except (OSError, psutil.Error):  # ended meanwhile
            continue
        found += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:"))
    return found


def forget(directory: Path) -> None:
    """Takes a directory's files out of the page cache: a model of 72B is not in there either."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str], source: Path) -> tuple[float, int]:
    """(seconds, peak anonymous bytes) of a command; `sync` is part of the time, for cp and conversions alike."""
    os.sync()
    forget(source)
    peak, begin = 0, time.perf_counter()
    process = psutil.Popen(command)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    finished = time.perf_counter() - begin
    os.sync()
    print(
        f"  {finished:7.1f} s, {time.perf_counter() - begin:7.1f} s with sync, {peak / 2**20:7.0f} MiB  {command[-1]}",
        flush=True,
    )
    return time.perf_counter() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is reported")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=options.directory))
    tools = Path(__file__).resolve().parents[1] / "checkpoint_convert"
    try:
        nbytes = make_checkpoint(root / "hf", options.size)
        print(f"{options.size}: {nbytes / 1e9:.1f} GB, {options.workers} workers", flush=True)

        def convert(script: str, source: Path, target: Path) -> list[str]:
            return [sys.executable, str(tools / script), "--workers", str(options.workers), "--quiet",
                    "--input", str(source), "--output", str(target)]  # fmt: skip

        found: dict[str, list[tuple[float, float, int]]] = {}  # seconds, those of cp, bytes
        for _ in range(options.rounds):
            for name, source, target, script in (
                ("hf-to-megatron", root / "hf", root / "megatron", "hf_to_megatron.py"),
                ("megatron-to-hf", root / "megatron", root / "back", "megatron_to_hf.py"),
            ):
                plain, _ = measure(["cp", "-r", str(source), str(root / "copy")], source)
                forget(root / "copy")
                shutil.rmtree(root / "copy")
                seconds, peak = measure(convert(script, source, target), source)
                forget(target)
                found.setdefault(name, []).append((seconds, plain, peak))
            shutil.rmtree(root / "megatron")
            shutil.rmtree(root / "back")
        report = {
            name: {
                "seconds": round(median(seconds for seconds, _, _ in rounds), 1),
                "cp_seconds": round(median(plain for _, plain, _ in rounds), 1),
                "ratio_to_cp": round(median(seconds / plain for seconds, plain, _ in rounds), 2),
                "anonymous_gib": round(max(peak for _, _, peak in rounds) / 2**30, 2),
            }
            for name, rounds in found.items()
        }
        print(json.dumps({"size": options.size, "bytes": nbytes, "workers": options.workers, **report}, indent=2))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
