"""From a chat with pictures to a `Prompt`: the one place where text becomes tokens and pixels become patches.

A picture is resized here, once, to a size the vision tower takes as it is. `Picture.image` is that resized picture and goes
to the rollout engine; its patches, made by the checkpoint's own image processor without another resize, go to the trainer.
Both sides so see the same pixels, whatever their resampling code.
"""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from eureka_megatron.config import RunConfig
from eureka_megatron.data.chat import Chat, located, read_chat
from eureka_megatron.data.pictures import load_picture
from eureka_megatron.data.positions import Span, mrope_positions
from eureka_megatron.data.prompts import system_prompt as named_system_prompt
from eureka_megatron.data.samples import training_sample
from eureka_megatron.data.vision_layout import vision_layout
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.types import Picture, Prompt, Sample


class Processor:
    """Tokenizer, chat template and image processor of one checkpoint.

    Attributes:
        tokenizer: the checkpoint's.
        image_token: "<|image_pad|>", and image_token_id.
        end_token_id: of "<|im_end|>", which closes a response.
        vision_token_ids: the tokens a policy must not sample; rollouts ban them.

    Raises:
        ConfigError: pixel bounds that cannot hold, or that the checkpoint's image processor would resize again.
        UserError: the directory lacks a part.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        min_pixels: int | None = 4 * 28 * 28,
        max_pixels: int | None = 640 * 28 * 28,
        max_prompt_tokens: int = 3000,
        system_prompt: str = "none",
    ) -> None:
        self.model_dir = Path(model_dir)
        self.max_prompt_tokens = max_prompt_tokens
        self.system_prompt = named_system_prompt(system_prompt)
        config, self._hf = _load(self.model_dir)
        own = self._hf.image_processor.size  # None asks for the checkpoint's own bounds
        self.min_pixels = own["shortest_edge"] if min_pixels is None else min_pixels
        self.max_pixels = own["longest_edge"] if max_pixels is None else max_pixels
        self.tokenizer = self._hf.tokenizer
        self._vision = config.vision_config
        names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>")
        ids = {name: self.tokenizer.convert_tokens_to_ids(name) for name in names}
        if ids["<|image_pad|>"] != config.image_token_id:
            raise UserError(
                f"{self.model_dir}: config.json says image_token_id={config.image_token_id}, but the tokenizer's "
                f"<|image_pad|> is {ids['<|image_pad|>']}"
            )
        self.image_token, self.video_token = names[:2]
        self.image_token_id, self.end_token_id = ids["<|image_pad|>"], ids["<|im_end|>"]
        self.vision_token_ids: tuple[int, ...] = tuple(ids[name] for name in names[:4])
        self._check_bounds()

    def prompt(
        self, message: Any, *, id: str = "", answer: str = "", folders: Sequence[Path] = (), origin: str = ""
    ) -> Prompt:
        """Read a chat, load its pictures from within `folders`, and make the prompt of it.

        Raises:
            UserError: starts with `origin`, names the picture or the length that is wrong.
        """
        with located(origin):
            chat = read_chat(message, system_prompt=self.system_prompt)
            pictures = tuple(self.picture(load_picture(address, folders), address) for address in chat.pictures)
            text = self.render(chat)
            tokens_S, offsets = self._expand(text, pictures)
            if len(tokens_S) > self.max_prompt_tokens:
                raise UserError(
                    f"the prompt has {len(tokens_S)} tokens; data.max_prompt_tokens={self.max_prompt_tokens}"
                )
        spans = [Span(offset, picture.grid_thw) for offset, picture in zip(offsets, pictures, strict=True)]
        return Prompt(
            id=id,
            text=text,
            answer=answer,
            tokens_S=tokens_S,
            positions_3S=mrope_positions(
                len(tokens_S),
                spans,
                merge_size=self._vision.spatial_merge_size,
                tokens_per_second=self._vision.tokens_per_second,
            ),
            pictures=pictures,
            picture_offsets=offsets,
            origin=origin,
        )

    def render(self, chat: Chat) -> str:
        """The chat template applied, open for the assistant; one placeholder a picture.

        Raises:
            UserError: the chat's text itself contains a placeholder.
        """
        text = self._hf.apply_chat_template(chat.turns, tokenize=False, add_generation_prompt=True)
        found = text.count(self.image_token)
        if found != len(chat.pictures) or self.video_token in text:
            raise UserError(
                f"the text has {found} {self.image_token} for {len(chat.pictures)} pictures; "
                "a data file must not contain placeholder tokens as text"
            )
        return text

    def picture(self, image: Image.Image, name: str = "") -> Picture:
        """Resize to the grid and cut into patches, in window order. `name` is for messages.

        Raises:
            UserError: the picture is more than 200 times as long as wide.
        """
        image = image.convert("RGB")
        height, width = self._target_size(image.height, image.width, name)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        values = self._hf.image_processor(images=[image], do_resize=False, return_tensors="pt")
        grid_thw = tuple(values["image_grid_thw"][0].tolist())
        layout = vision_layout(
            grid_thw,
            window_size=self._vision.window_size,
            patch_size=self._vision.patch_size,
            merge_size=self._vision.spatial_merge_size,
        )
        return Picture(
            key=blake2b(image.tobytes() + repr(grid_thw).encode(), digest_size=16).hexdigest(),
            image=image,
            grid_thw=grid_thw,
            patches_PD=values["pixel_values"].to(torch.float32)[torch.from_numpy(layout.patch_order_P)],
            coordinates_P2=layout.coordinates_P2,
            unit_order_U=layout.unit_order_U,
            window_lengths_W=layout.window_lengths_W,
            frame_lengths_F=layout.frame_lengths_F,
        )

    def encode_response(self, text: str) -> np.ndarray:
        """int64 [R]: the tokens of a response, closed by the end token.

        Raises:
            UserError: the text contains a vision token.
        """
        tokens_R = np.array([*self._encode(text), self.end_token_id], dtype=np.int64)
        if np.isin(tokens_R, self.vision_token_ids).any():
            raise UserError(f"the response contains a vision token: {text[:80]!r}")
        return tokens_R

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def sft_sample(self, prompt: Prompt, response: str) -> Sample:
        """A sample that imitates `response`: mask and advantage 1 on its tokens."""
        return training_sample(prompt, self.encode_response(response))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _expand(self, text: str, pictures: Sequence[Picture]) -> tuple[np.ndarray, tuple[int, ...]]:
        """Tokens with one placeholder an embedding, and where each picture's placeholders begin."""
        tokens = np.array(self._encode(text), dtype=np.int64)
        units_I = np.array([picture.units for picture in pictures], dtype=np.int64)
        places_I = np.flatnonzero(tokens == self.image_token_id)
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[places_I] = units_I
        offsets_I = places_I + np.cumsum(units_I - 1) - (units_I - 1)
        return np.repeat(tokens, repeats), tuple(offsets_I.tolist())

    def _target_size(self, height: int, width: int, name: str = "") -> tuple[int, int]:
        """The size that smart_resize leaves alone; rarely it takes more than one step to get there."""
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        for _ in range(8):
            try:
                target = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
            except ValueError:
                raise UserError(
                    f"picture {name[:120]!r} is {width}×{height}: more than 200 times as long as wide"
                ) from None
            if target == (height, width):
                return target
            height, width = target
        raise ConfigError(
            f"data.min_pixels={self.min_pixels} and data.max_pixels={self.max_pixels} are too close: "
            f"no multiple of {factor} pixels lies between them for picture {name[:120]!r}"
        )

    def _check_bounds(self) -> None:
        """What is resized here must pass the checkpoint's image processor, which the rollout engine runs, unchanged."""
        size = self._hf.image_processor.size
        least, most = size["shortest_edge"], size["longest_edge"]
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        if self.max_pixels < factor**2:
            raise ConfigError(f"data.max_pixels={self.max_pixels} is less than one vision token, {factor**2} pixels")
        if self.min_pixels < least:
            raise ConfigError(f"data.min_pixels={self.min_pixels} is below the checkpoint's own bound, {least}")
        if self.max_pixels > most:
            raise ConfigError(f"data.max_pixels={self.max_pixels} is above the checkpoint's own bound, {most}")


def _load(model_dir: Path) -> tuple[Any, Any]:
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir} is no Hugging Face checkpoint: config.json is missing")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{model_dir}: tokenizer or processor cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    if config.model_type != "qwen2_5_vl" or not hasattr(processor, "image_processor"):
        raise UserError(f"{model_dir} holds a {config.model_type!r} checkpoint; qwen2_5_vl is what is supported")
    return config, processor


def make_processor(config: RunConfig) -> Processor:
    """The processor of a run's checkpoint, with the run's limits and system prompt."""
    data = config.data
    return Processor(
        config.model.path,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_prompt_tokens=data.max_prompt_tokens,
        system_prompt=data.system_prompt,
    )
