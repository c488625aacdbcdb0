"""Pictures read, decoded, resized and cut into patches: ours against transformers' processor of the same checkpoint, per core and second.

    python tools/benchmark/data.py [--rounds 5] [--pictures 24] [--json FILE]

JPEG photographs (made up: smooth with some noise) of 640 × 480, resized to at most 448 × 448 pixels' worth, one thread. Ours makes everything a step needs: the picture
that the engine gets, its patches in window order, its content hash. transformers makes the patches alone. Both sides' patches must agree
before anything is timed; how far they differ is told.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import Result, arguments, build_model, in_turns, median_ratio, report
from PIL import Image

from eureka_megatron.data.model_inputs import reading_order
from eureka_megatron.data.pictures import load_picture
from eureka_megatron.data.processor import Processor

WIDTH, HEIGHT, MOST = 640, 480, 448 * 448
SAME = 2 / 255 / 0.26  # two steps of a byte after normalisation


def write_photographs(folder: Path, count: int) -> list[Path]:
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(smooth + random.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:03d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--pictures", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        paths = write_photographs(folder, options.pictures)
        model_dir = build_model(folder / "model", "tiny")
        processor = Processor(model_dir, max_pixels=MOST)
        from transformers import AutoImageProcessor

        size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
        theirs = AutoImageProcessor.from_pretrained(model_dir)

        def ours_of(path: Path) -> torch.Tensor:
            return reading_order(processor.picture(load_picture(str(path), (folder,)), str(path)))

        def theirs_of(path: Path) -> torch.Tensor:
            with Image.open(path) as picture:
                return theirs(images=[picture.convert("RGB")], size=size, return_tensors="pt")["pixel_values"]

        gap = max(float((ours_of(path) - theirs_of(path)).abs().max()) for path in paths[:4])
        if gap > SAME:
            raise SystemExit(f"patches differ by {gap:.4f}")
        print(f"{type(theirs).__name__}: patches differ by {gap:.1e} at most", flush=True)
        tasks = {
            "ours": lambda: [processor.picture(load_picture(str(path), (folder,)), str(path)) for path in paths],
            "transformers": lambda: [theirs_of(path) for path in paths],
            "decoding": lambda: [load_picture(str(path), (folder,)) for path in paths],
        }
        seconds = in_turns(tasks, options.rounds)
    rates = {name: len(paths) / median(values) for name, values in seconds.items()}
    peer = f"transformers {rates['transformers']:.0f} a second, ours {rates['ours']:.0f}; decoding alone {rates['decoding']:.0f}"
    ratio = median_ratio(seconds["transformers"], seconds["ours"])
    details = {"pictures_per_second": rates, "largest_difference": gap}
    report(
        [Result("pictures per core and second, against transformers", ratio, "×", peer=peer, details=details)],
        options.json,
    )


if __name__ == "__main__":
    main()
