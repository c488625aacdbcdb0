"""Prompts with videos of several kinds for tests: lengths, rates and sizes, lists of frames and a file, mixed with pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from eureka_megatron.data.processor import Processor
from eureka_megatron.types import Prompt


def video_prompts(model: Path, folder: Path) -> list[Prompt]:
    """Six prompts of at most 260 tokens; the first two show equal frames at other rates. Frames and file are written to `folder`."""
    import cv2

    random = np.random.default_rng(0)
    for number in range(61):
        Image.fromarray(random.integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 6.0, (130, 96))
    for _ in range(20):
        writer.write(cv2.resize(random.integers(0, 256, (6, 8, 3), dtype=np.uint8), (130, 96)))
    writer.release()
    processor = Processor(model, min_pixels=28 * 28, max_prompt_tokens=400)
    names = [f"{number}.png" for number in range(61)]
    image = {"type": "image", "image": "7.png"}
    contents = {
        "long, fractional, then image": [{"type": "video", "video": names, "fps": 1.7}, image, "How many circles?"],
        "other rate": [{"type": "video", "video": names, "fps": 0.9}, image, "How many circles?"],
        "file": ["How many", {"type": "video", "video": "clip.mp4", "fps": 3}, "squares?"],
        "two videos": [
            image,
            {"type": "video", "video": names[3:6], "max_pixels": 2 * 28 * 28},
            image,
            {"type": "video", "video": names[:8], "fps": 23.976},
        ],
        "image only": [image, "How many?"],
        "text only": ["How many?"],
    }
    return [
        processor.prompt([{"role": "user", "content": content}], id=name, answer="3", folders=[folder])
        for name, content in contents.items()
    ]
