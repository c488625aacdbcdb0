"""Samples nobody has to provide: noise pictures of chosen sizes and random questions."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from eureka_megatron.data.processor import Processor
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.types import Sample


def made_up_samples(
    hf_dir: Path | str, seed: int = 0, pictures: Iterable[tuple[tuple[int, int], ...]] = ()
) -> list[Sample]:
    """Samples with noise pictures of the given (height, width) in merge units, one tuple a sample; () is text only."""
    layouts = tuple(pictures) or (((3, 3),), (), ((1, 1), (5, 2)), ((4, 8), (2, 3), (7, 5)), ())
    side = 2 * read_hf_config(hf_dir).vision_config.patch_size
    processor = Processor(hf_dir, min_pixels=None, max_pixels=None, max_prompt_tokens=1 << 20, system_prompt="none")
    random = np.random.default_rng(seed)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for number, sizes in enumerate(layouts):
            content: list[dict[str, str]] = []
            for place, (height, width) in enumerate(sizes):
                pixels = random.integers(0, 256, (height * side, width * side, 3), dtype=np.uint8)
                path = Path(folder) / f"{number}-{place}.png"
                Image.fromarray(pixels).save(path)
                content += [{"type": "image", "image": str(path)}, {"type": "text", "text": f"picture {place}"}]
            content.append({"type": "text", "text": f"How many? {int(random.integers(1 << 30))}"})
            message = [{"role": "user", "content": content}]
            prompt = processor.prompt(message, id=f"made-up-{number}", folders=(Path(folder),))
            samples.append(processor.sft_sample(prompt, f"<answer>{int(random.integers(1 << 30))}</answer>"))
    return samples
