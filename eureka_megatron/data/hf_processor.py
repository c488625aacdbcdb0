"""The tokenizer and the image and video processor of a checkpoint, as transformers bundles them, and whether they fit its model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from eureka_megatron.data.endings import check_files
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import VisionConfig

_IMAGE_PROCESSOR = "Qwen2VLImageProcessor"  # early revisions of published files call it Qwen2_5_VLImageProcessor


def load_hf_processor(model_dir: Path) -> Any:
    """The checkpoint's tokenizer, image and video processor, as transformers bundles them."""
    try:
        processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_files(model_dir)
        reason = _unknown_image_processor(model_dir) or str(error).strip().splitlines()[0]
        raise UserError(f"{model_dir}: tokenizer or processor cannot be loaded: {reason}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(
            f"{model_dir}: preprocessor_config.json or processor_config.json is missing: there is no image processor"
        )
    processor.video_processor.cap_pixels_per_frame = False  # frames come resized; unset, transformers warns
    return processor


def picture_bounds(image_processor: Any, model_dir: Path) -> tuple[int, int]:
    """Least and most pixels of a picture: `size` has had two pairs of names."""
    size = image_processor.size
    bounds = size.shortest_edge or size.min_pixels, size.longest_edge or size.max_pixels
    if None in bounds:
        raise UserError(
            f"{model_dir}: the image processor's size must have shortest_edge and longest_edge (or min_pixels and max_pixels)"
        )
    return bounds


def check_patches(processor: Any, vision: VisionConfig, model_dir: Path) -> None:
    """Pictures must be cut into the patches that the tower takes."""
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for kind in ("image_processor", "video_processor"):
        for name, size in sizes.items():
            if (found := getattr(getattr(processor, kind), name)) != size:
                raise UserError(
                    f"{model_dir}: the {kind} has {name} {found!r}; vision_config in config.json has {size}"
                )


def _unknown_image_processor(model_dir: Path) -> str | None:
    """What to write where the file names a class by a name that transformers has given up; engines would stumble over it as well."""
    path = model_dir / "preprocessor_config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["image_processor_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if str(name).removesuffix("Fast").removesuffix("Pil") == _IMAGE_PROCESSOR:
        return None
    return f"{path.name} says image_processor_type {name!r}, which this transformers does not know; write {_IMAGE_PROCESSOR!r} there"
