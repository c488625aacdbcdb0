"""From a chat with pictures and videos to a `Prompt`: the one place where text becomes tokens and pixels become patches.

A picture is resized here, once, to a size the vision tower takes as it is. `Picture.image` (of a video `Picture.frames`) is that resized
picture and goes to the rollout engine; its patches, made by the checkpoint's own image or video processor without another resize, go to
the trainer. Both sides so see the same pixels, whatever their resampling code.
"""

import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from eureka_megatron.config import RunConfig
from eureka_megatron.data.chat import Address, Chat, Visual, located, map_texts, read_chat
from eureka_megatron.data.endings import read_template, response_ends
from eureka_megatron.data.hf_processor import check_patches, load_hf_processor, picture_bounds
from eureka_megatron.data.pictures import load_picture, picture_size, short
from eureka_megatron.data.positions import Span, mrope_positions
from eureka_megatron.data.prompts import system_prompt as named_system_prompt
from eureka_megatron.data.samples import training_sample
from eureka_megatron.data.videos import Clip, open_clip
from eureka_megatron.data.vision_layout import vision_layout
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.types import Picture, Prompt, Sample

# Where the n-th text of a chat stands, while the template is applied without them.
_HIDDEN = re.compile("\ufdd0(\\d+)\ufdd0")


@dataclass(frozen=True)
class VisualLimits:
    """How large pictures and videos become; a row may narrow or change them.

    Attributes:
        min_pixels, max_pixels: of a picture. None: the checkpoint's own. min_pixels holds for frames, too.
        video_max_pixels: of a frame.
        video_fps: frames a second to take from a file, or that a list of frames was taken with, where the row does not say.
        video_max_frames: the most to take from a file, or that a list may have.
    """

    min_pixels: int | None = 4 * 28 * 28
    max_pixels: int | None = 640 * 28 * 28
    video_max_pixels: int = 128 * 28 * 28
    video_fps: float = 2.0
    video_max_frames: int = 768


class VisualOptions(TypedDict, total=False):
    """`VisualLimits` as keywords."""

    min_pixels: int | None
    max_pixels: int | None
    video_max_pixels: int
    video_fps: float
    video_max_frames: int


class Processor:
    """Tokenizer, chat template, image and video processor of one checkpoint. Several threads may make prompts at once.

    Args:
        limits: the fields of `VisualLimits`.
        dtype: of the rollout engine's model. vLLM hands "seconds per time step" on in it, so positions depend on it.

    Attributes:
        tokenizer: the checkpoint's.
        image_token, video_token: "<|image_pad|>" and "<|video_pad|>", and image_token_id, video_token_id.
        ends: the tokens that end a response, and why; see `endings`.
        end_token_id: the first of them, which closes a response to imitate.
        vision_token_ids: the tokens a policy must not sample; rollouts ban them.

    Raises:
        ConfigError: pixel bounds that cannot hold, or that the checkpoint's image processor would resize again.
        UserError: the directory lacks a part.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        max_prompt_tokens: int = 3000,
        system_prompt: str = "none",
        dtype: str = "float32",
        **limits: Unpack[VisualOptions],
    ) -> None:
        bounds = VisualLimits(**limits)
        self.model_dir = Path(model_dir)
        self.max_prompt_tokens = max_prompt_tokens
        self.video_max_pixels, self.video_fps = bounds.video_max_pixels, bounds.video_fps
        self.video_max_frames = bounds.video_max_frames
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.system_prompt = named_system_prompt(system_prompt)
        config = read_hf_config(self.model_dir)
        self._hf = load_hf_processor(self.model_dir)
        self._template, _ = read_template(self.model_dir)
        self._own_bounds = picture_bounds(self._hf.image_processor, self.model_dir)
        check_patches(self._hf, config.vision_config, self.model_dir)
        self.min_pixels = self._own_bounds[0] if bounds.min_pixels is None else bounds.min_pixels
        self.max_pixels = self._own_bounds[1] if bounds.max_pixels is None else bounds.max_pixels
        self.tokenizer, self._one_at_a_time = self._hf.tokenizer, threading.Lock()
        self._vision, self._rows = config.vision_config, config.text_config.vocab_size
        names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        ids = {name: self.tokenizer.convert_tokens_to_ids(name) for name in names}
        for key, name in (("image_token_id", names[0]), ("video_token_id", names[1])):
            if ids[name] != getattr(config, key):
                raise UserError(
                    f"{self.model_dir}: config.json says {key}={getattr(config, key)}, but the tokenizer's {name} is {ids[name]}"
                )
        self.image_token, self.video_token = names[:2]
        self.image_token_id, self.video_token_id = ids[names[0]], ids[names[1]]
        self.ends = response_ends(self.model_dir, self.tokenizer, config)
        self.end_token_id = next(iter(self.ends.reasons))
        added = self.tokenizer.added_tokens_decoder
        self._control_ids = {token.content: number for number, token in added.items() if token.special}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        ends = {added[token].content for token in self.ends.reasons if token in added}
        ends |= {self.tokenizer.eos_token, self.tokenizer.pad_token} - {None}
        self._ends = re.compile(rf"(?:(?:{'|'.join(map(re.escape, ends))})\s*)+$")
        self.vision_token_ids: tuple[int, ...] = tuple(ids[name] for name in names)
        self._check_bounds()

    def prompt(
        self, message: Any, *, id: str = "", answer: str = "", folders: Sequence[Path] = (), origin: str = ""
    ) -> Prompt:
        """Read a chat, load its pictures and videos from within `folders`, and make the prompt of it.

        Raises:
            UserError: starts with `origin`, names the picture, video, frame or length that is wrong.
        """
        with located(origin):
            chat = read_chat(message, system_prompt=self.system_prompt)
            pictures = tuple(self._load(visual, folders) for visual in chat.visuals)
            text = self.render(chat)
            tokens_S, offsets = self._expand(self._inside(self._tokens(chat, text)), pictures)
            if len(tokens_S) > self.max_prompt_tokens:
                raise UserError(
                    f"the prompt has {len(tokens_S)} tokens; data.max_prompt_tokens={self.max_prompt_tokens}"
                )
        spans = [
            Span(offset, picture.grid_thw, picture.seconds_per_grid)
            for offset, picture in zip(offsets, pictures, strict=True)
        ]
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

    def length(self, message: Any, *, folders: Sequence[Path] = ()) -> int:
        """How many tokens `prompt` makes of it, by the sizes of its pictures; only videos are decoded. Raises as `prompt` does."""
        chat = read_chat(message, system_prompt=self.system_prompt)
        if any(visual.kind == "video" for visual in chat.visuals):
            return len(self.prompt(message, folders=folders).tokens_S)
        tokens = len(self._inside(self._tokens(chat, self.render(chat)))) - len(chat.visuals)
        for visual in chat.visuals:
            width, height = picture_size(name := visual.addresses[0], folders)
            size = self._target_size(height, width, name, visual.min_pixels, visual.max_pixels)
            tokens += math.prod(size) // (self._vision.patch_size * self._vision.spatial_merge_size) ** 2
        return tokens

    def render(self, chat: Chat) -> str:
        """The chat template applied, open for the assistant; one placeholder a picture or video.

        Raises:
            UserError: the chat's text itself contains a placeholder.
        """
        text = self._apply_template(chat.turns)
        for kind, token in (("image", self.image_token), ("video", self.video_token)):
            found, shown = text.count(token), sum(visual.kind == kind for visual in chat.visuals)
            if found != shown:
                raise UserError(
                    f"the text has {found} {token} for {shown} {'pictures' if kind == 'image' else 'videos'}; "
                    "a data file must not contain placeholder tokens as text"
                )
        return text

    def picture(
        self, image: Image.Image, name: Address = "", *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Picture:
        """Resize to the grid and cut into patches, in window order.

        Args:
            name: for messages.
            min_pixels, max_pixels: narrower bounds than the processor's.

        Raises:
            UserError: the picture is more than 200 times as long as wide.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")
        height, width = self._target_size(image.height, image.width, name, min_pixels, max_pixels)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        values = self._hf.image_processor(images=[image], do_resize=False, return_tensors="pt")
        return self._record(values["pixel_values"], values["image_grid_thw"][0], image.tobytes(), image=image)

    def video(
        self, clip: Clip, name: Address = "", *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Picture:
        """Resize all frames to the grid and cut them into patches, as `picture`. An odd last frame is doubled.

        Args:
            name: for messages.
            min_pixels, max_pixels: of a frame, in place of the processor's.

        Raises:
            UserError: frames differ in size, are more than 200 times as long as wide, or are too many tokens.
        """
        together = self._hf.video_processor.temporal_patch_size
        with closing(clip.frames):
            resized = list(self._resized(clip, name, min_pixels, max_pixels))
        frames = np.stack(resized + [resized[-1]] * (-len(resized) % together))
        values = self._hf.video_processor(videos=[frames], do_resize=False, do_sample_frames=False, return_tensors="pt")
        # Through float32 into the engine's type: the way the number takes through vLLM's input processor.
        seconds = torch.tensor(together / clip.fps, dtype=torch.float32).to(self._dtype).item()
        return self._record(
            values["pixel_values_videos"],
            values["video_grid_thw"][0],
            frames.tobytes(),
            image=None,
            frames=frames,
            seconds_per_grid=seconds,
        )

    def encode_response(self, text: str) -> np.ndarray:
        """int64 [R]: the tokens of a response, closed by one end token, whether the text has brought its own or not.

        Raises:
            UserError: the text is empty, needs a token that the model does not have, or spells a control token elsewhere: to imitate
                that would end the turn or show a picture.
        """
        return np.array([*self._inside(self._encode(self.response_text(text))), self.end_token_id], dtype=np.int64)

    def response_text(self, text: str) -> str:
        """What `encode_response` makes tokens of. Raises as it does."""
        text = self._ends.sub("", text)
        if not text.strip():
            raise UserError("the response is empty")
        if found := self._control.search(text):
            raise UserError(
                f"the response contains the control token {found[0]}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"
            )
        return text

    def describe_ends(self) -> str:
        """Which tokens end a response, and why, as one line."""
        named = [f"{self._name(token)} ({token}: {reason})" for token, reason in self.ends.reasons.items()]
        ignored = [f"; {token} ({why}) is no token of the model" for token, why in self.ends.passed_over.items()]
        return f"a response ends with {' or '.join(named)}{''.join(ignored)}"

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def sft_sample(self, prompt: Prompt, response: str) -> Sample:
        """A sample that imitates `response`: mask and advantage 1 on its tokens."""
        return training_sample(prompt, self.encode_response(response))

    def _apply_template(self, turns: list[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Tokens of a text. plain: what spells a control token becomes the tokens of its letters."""
        with self._one_at_a_time:  # Rust tokenizers refuse ("Already borrowed") what two threads ask at once
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    def _tokens(self, chat: Chat, text: str) -> list[int]:
        """Tokens of a rendered chat: control tokens where the template put them, never where the chat's own texts spell them."""
        texts: list[str] = []

        def hide(text: str) -> str:
            texts.append(text)
            return f"\ufdd0{len(texts) - 1}\ufdd0"

        turns = map_texts(chat.turns, hide)
        if not self._control.search("".join(texts)):
            return self._encode(text)
        tokens: list[int] = []
        for place, piece in enumerate(self._control.split(self._apply_template(turns))):
            if place % 2:
                tokens.append(self._control_ids[piece])
            else:
                tokens += self._encode(_HIDDEN.sub(lambda found: texts[int(found[1])], piece), plain=True)
        return tokens

    @property
    def outgrown(self) -> bool:
        """Whether the tokenizer knows more tokens than the embedding has rows."""
        return len(self.tokenizer) > self._rows

    def _inside(self, tokens: list[int]) -> list[int]:
        """The tokens, when the embedding has a row for each: tokenizers may have got tokens that the model was not resized for."""
        if tokens and (largest := max(tokens)) >= self._rows:
            raise UserError(
                f"token {self._name(largest)} is number {largest}, but the embedding has {self._rows} rows (vocab_size in "
                f"{self.model_dir / 'config.json'}): tokens were added to the tokenizer and the model not resized"
            )
        return tokens

    def _name(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def _expand(self, unexpanded: list[int], pictures: Sequence[Picture]) -> tuple[np.ndarray, tuple[int, ...]]:
        """Tokens with one placeholder an embedding, and where each picture's placeholders begin."""
        tokens = np.array(unexpanded, dtype=np.int64)
        units_I = np.array([picture.units for picture in pictures], dtype=np.int64)
        places_I = np.flatnonzero(np.isin(tokens, (self.image_token_id, self.video_token_id)))
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[places_I] = units_I
        offsets_I = places_I + np.cumsum(units_I - 1) - (units_I - 1)
        return np.repeat(tokens, repeats), tuple(offsets_I.tolist())

    def _load(self, visual: Visual, folders: Sequence[Path]) -> Picture:
        bounds = {"min_pixels": visual.min_pixels, "max_pixels": visual.max_pixels}
        name = visual.addresses[0]
        if visual.kind == "image":
            return self.picture(load_picture(name, folders), name, **bounds)

        def choose(total: int, fps: float) -> list[int]:
            return self._choose(visual, total, fps)

        clip = open_clip(visual, folders, choose=choose, fps=self.video_fps, max_frames=self.video_max_frames)
        return self.video(clip, name, **bounds)

    def _choose(self, visual: Visual, total: int, fps: float) -> list[int]:
        """Which frames of a file to show: the rule of the checkpoint's video processor."""
        name = short(visual.addresses[0])
        if visual.frames is not None and visual.frames > min(total, self.video_max_frames):
            raise UserError(
                f"video {name} has nframes={visual.frames}, but only {total} frames; data.video_max_frames={self.video_max_frames}"
            )
        if total == 1:
            return [0]
        wanted: dict[str, float] = {"fps": visual.fps or self.video_fps}
        if visual.frames is not None:
            wanted = {"num_frames": min(max(visual.frames, 2), total // 2 * 2)}
        indices = self._hf.video_processor.sample_frames(
            VideoMetadata(total_num_frames=total, fps=fps), max_frames=self.video_max_frames, **wanted
        )
        return sorted({min(int(index), total - 1) for index in indices})  # rounding may give one too many at the end

    def _resized(
        self, clip: Clip, name: Address, min_pixels: int | None, max_pixels: int | None
    ) -> Iterator[np.ndarray]:
        """The frames at the size of the grid, uint8 [height, width, 3] each. The first decides on the size of all."""
        from torchvision.transforms.v2 import functional

        processor = self._hf.video_processor
        interpolation = pil_torch_interpolation_mapping[processor.resample]
        first: tuple[int, ...] | None = None
        for number, frame in enumerate(clip.frames, start=1):
            if first is None:
                first = frame.shape
                size = self._frame_size(clip, first[0], first[1], name, min_pixels, max_pixels)
            if frame.shape != first:
                raise UserError(
                    f"video {short(name)}: frame {number} is {frame.shape[1]}×{frame.shape[0]}, the first is {first[1]}×{first[0]}; "
                    "all frames of a video have one size"
                )
            pixels = torch.tensor(frame).permute(2, 0, 1)
            if size != first[:2]:  # by the video processor's own means: its patches of the original frames are ours
                pixels = functional.resize(pixels, list(size), interpolation=interpolation, antialias=True)
            yield pixels.permute(1, 2, 0).contiguous().numpy()

    def _frame_size(
        self, clip: Clip, height: int, width: int, name: Address, min_pixels: int | None, max_pixels: int | None
    ) -> tuple[int, int]:
        """Height and width of the grid's frames; tells too long a video before all of it is decoded."""
        most = max_pixels or max(self.video_max_pixels, min_pixels or 0)
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        try:
            size = smart_resize(height, width, factor, min(min_pixels or self.min_pixels, most), most)
        except ValueError:
            raise _too_long(name, width, height) from None
        steps = -(-clip.count // self._hf.video_processor.temporal_patch_size)
        tokens = steps * (size[0] // factor) * (size[1] // factor)
        if tokens > self.max_prompt_tokens:
            raise UserError(
                f"video {short(name)}: {clip.count} frames of {size[1]}×{size[0]} pixels are {tokens} tokens; "
                f"data.max_prompt_tokens={self.max_prompt_tokens} (fewer: fps, nframes, max_pixels)"
            )
        return size

    def _record(self, patches_PD: torch.Tensor, grid: torch.Tensor, pixels: bytes, **values: Any) -> Picture:
        """The record of patches that come in the image processor's order; `pixels` identify it."""
        grid_thw = tuple(grid.tolist())
        layout = vision_layout(
            grid_thw,
            window_size=self._vision.window_size,
            patch_size=self._vision.patch_size,
            merge_size=self._vision.spatial_merge_size,
        )
        return Picture(
            key=blake2b(pixels + repr(grid_thw).encode(), digest_size=16).hexdigest(),
            grid_thw=grid_thw,
            # In numpy, which gathers rows in a quarter of the time.
            patches_PD=torch.from_numpy(patches_PD.to(torch.float32).numpy()[layout.patch_order_P]),
            coordinates_P2=layout.coordinates_P2,
            unit_order_U=layout.unit_order_U,
            window_lengths_W=layout.window_lengths_W,
            frame_lengths_F=layout.frame_lengths_F,
            **values,
        )

    def _target_size(
        self, height: int, width: int, name: Address, min_pixels: int | None, max_pixels: int | None
    ) -> tuple[int, int]:
        """The size that smart_resize leaves alone; rarely it takes more than one step to get there."""
        least, most = (
            min(max(bound or own, self.min_pixels), self.max_pixels)
            for bound, own in ((min_pixels, self.min_pixels), (max_pixels, self.max_pixels))
        )
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        for _ in range(8):
            try:
                target = smart_resize(height, width, factor, least, most)
            except ValueError:
                raise _too_long(name, width, height) from None
            if target == (height, width):
                return target
            height, width = target
        raise ConfigError(
            f"data.min_pixels={least} and data.max_pixels={most} are too close: "
            f"no multiple of {factor} pixels lies between them for picture {short(name)}"
        )

    def _check_bounds(self) -> None:
        """What is resized here must pass the checkpoint's image processor, which the rollout engine runs, unchanged."""
        least, most = self._own_bounds
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        if self.max_pixels < factor**2:
            raise ConfigError(f"data.max_pixels={self.max_pixels} is less than one vision token, {factor**2} pixels")
        if self.min_pixels < least:
            raise ConfigError(f"data.min_pixels={self.min_pixels} is below the checkpoint's own bound, {least}")
        if self.max_pixels > most:
            raise ConfigError(f"data.max_pixels={self.max_pixels} is above the checkpoint's own bound, {most}")


def _too_long(name: Address, width: int, height: int) -> UserError:
    return UserError(f"picture {short(name)} is {width}×{height}: more than 200 times as long as wide")


def make_processor(config: RunConfig) -> Processor:
    """The processor of a run's checkpoint, with the run's limits and system prompt."""
    data = config.data
    return Processor(
        config.model.path,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_prompt_tokens=data.max_prompt_tokens,
        system_prompt=data.system_prompt,
        video_max_pixels=data.video_max_pixels,
        video_fps=data.video_fps,
        video_max_frames=data.video_max_frames,
        dtype=config.model.dtype,
    )
