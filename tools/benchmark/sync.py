"""Weight sync from a trainer rank into a real vLLM engine, against a plain copy of the same bytes in memory.

    python tools/benchmark/sync.py [--sizes tiny medium large] [--rounds 7] [--json FILE]

Real processes: driver, one rank, one engine under Ray, the path of every step (`Run.sync_weights` without comparison of checksums): Megatron's shards
merged to Hugging Face tensors, buckets through Ray's object store, vLLM's loader and its repacking, caches dropped. The copy is of one tensor of as many bytes
into another that is there already, with all cores. Both take turns. The ratio is the sync's bytes a second over the copy's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import Result, arguments, build_model, in_turns, median_ratio, opened, report, run_config, write_questions

GOAL = 0.5
SIZES = ("tiny", "medium", "large")


def measure(folder: Path, size: str, rounds: int) -> Result:
    build_model(folder / "model", size)
    write_questions(folder / "data", 8, 84)
    nbytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    source = torch.ones(nbytes // 4)
    target = torch.zeros_like(source)
    with opened(run_config(folder, "run", ["training.responses_per_update=128"])) as run:
        tasks: dict[str, Callable[[], object]] = {"sync": run.sync_weights, "copy": lambda: target.copy_(source)}
        seconds = in_turns(tasks, rounds, warmup=2)
    rates = {name: nbytes / median(values) / 1e9 for name, values in seconds.items()}
    peer = f"copy {rates['copy']:.2f} GB/s; sync {rates['sync']:.3f} GB/s, {median(seconds['sync']):.3f} s"
    details = {"bytes": nbytes, "gb_per_second": rates, "seconds": {k: median(v) for k, v in seconds.items()}}
    ratio = median_ratio(seconds["copy"], seconds["sync"])
    return Result(
        f"weight sync, {nbytes / 1e6:.0f} MB, against a copy",
        ratio,
        "×",
        GOAL,
        peer=peer,
        details=details,
        where="oneDNN puts each matrix into its own order, and vLLM's layer-wise reload takes 0.35 ms a tensor (docs/performance.md)",
    )


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    results = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="sync-") as name:
            results.append(measure(Path(name), size, options.rounds))
            print(results[-1].what, results[-1].peer, flush=True)
    report(results, options.json)


if __name__ == "__main__":
    main()
