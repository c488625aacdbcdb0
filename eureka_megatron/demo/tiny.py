"""A complete, tiny Qwen2.5-VL checkpoint built by code: weights, tokenizer, chat template, processor, generation.

Everything a real checkpoint directory has, small enough for a CPU: tests compare layouts with it and `eureka demo`
trains it from scratch. Nothing is downloaded, nothing depends on Megatron. Default sizes: 1.8 M parameters; every size
a parity test wants to vary is a keyword. Head dimensions default to 32, the smallest vLLM's CPU attention supports.

The tokenizer is a byte-level BPE (Qwen's pre-tokenization pattern) trained on a fixed list of sentences, so equal
arguments give equal files. The tags of the answer form are single, ordinary (not special) tokens: decoding keeps them.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{")

# What the merges are learned from; words of the counting task and of the chat template become one token each.
SENTENCES = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    *(f"How many {shape} are there in the picture?" for shape in ("circles", "squares")),
    *(
        f"How many {colour} {shape} are in the picture?"
        for colour in ("red", "green", "blue")
        for shape in ("circles", "squares")
    ),
    "How many more circles than squares are there?",
    *("R . B . G / r . b . g / . R . B . G / r . b . g",) * 4,
)

# Qwen's pre-tokenization: words with at most one leading mark, single digits, runs of marks, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Same behaviour as Qwen2.5-VL's template: a default system turn, one placeholder a picture, content as string or list.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' or 'video' in part %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class TinyOptions:
    """A tiny checkpoint; parity tests vary its shape. `full_attention_blocks` of the tower do without windows.

    randomize_all makes biases and norm weights random too (by default biases are 0 and norms 1, which hides mistakes). window_size and the
    image processor's min_pixels and max_pixels are in pixels. The tokenizer's merges are learned from `sentences`. Weights above
    max_shard_size are split over several safetensors files with an index; `weights=False` leaves them out. vocab_size, the tokens of the tokenizer, is at least 268 (bytes, special tokens,
    tags), the rest are merges. The embedding has `spare_rows` more, as published ones do.
    """

    seed: int = 0
    randomize_all: bool = False
    min_pixels: int = 28 * 28
    max_pixels: int = 640 * 28 * 28
    sentences: Sequence[str] = SENTENCES
    dtype: torch.dtype = torch.float32
    max_shard_size: int | str = "5GB"
    weights: bool = True
    tied: bool = False  # the output layer shares the embedding, as in the 3B model
    text_hidden: int = 128
    text_layers: int = 4
    text_heads: int = 4
    kv_heads: int = 2
    ffn: int = 256
    vision_hidden: int = 128
    vision_depth: int = 4
    vision_heads: int = 4
    vision_ffn: int = 256
    window_size: int = 112
    full_attention_blocks: Sequence[int] = (1, 3)
    tokens_per_second: int = 2
    vocab_size: int = 384
    spare_rows: int = 0
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6  # of the text
    rope_theta: float = 1e6


def build_tiny(directory: Path | str, **options: Any) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint into `directory` (created when missing) and return it.

    Args:
        options: fields of `TinyOptions`.

    Raises:
        TypeError: there is no such field.
        ValueError: the sizes do not fit each other.
    """
    directory, shape = Path(directory), TinyOptions(**options)
    tokenizer = build_tokenizer(shape.vocab_size, shape.sentences)
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    _check_sizes(shape)
    directory.mkdir(parents=True, exist_ok=True)
    config = _hf_config(shape, ids)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_processor_files(directory, shape.min_pixels, shape.max_pixels)
    if shape.weights:
        model: Any = build_weights(config, shape.seed, shape.randomize_all)
        model.to(dtype=shape.dtype).save_pretrained(directory, max_shard_size=shape.max_shard_size)
    # After the weights: saving those writes a generation_config.json of its own, with one end token only.
    GenerationConfig(
        do_sample=True,
        temperature=1.0,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    ).save_pretrained(directory)
    return directory


def _hf_config(shape: TinyOptions, ids: dict[str, Any]) -> Qwen2_5_VLConfig:
    ends: dict[str, Any] = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    whole: dict[str, Any] = ends | {"pad_token_id": ids["<|endoftext|>"]}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab_size + shape.spare_rows,
            "hidden_size": shape.text_hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": shape.rms_norm_eps,
            "initializer_range": shape.initializer_range,
            "max_position_embeddings": shape.max_position_embeddings,
            "max_window_layers": shape.text_layers,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": mrope_section(shape.text_hidden // shape.text_heads),
            },
            "tie_word_embeddings": shape.tied,
            **ends,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_ffn,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.text_hidden,
            "window_size": shape.window_size,
            "fullatt_block_indexes": list(shape.full_attention_blocks),
            "tokens_per_second": shape.tokens_per_second,
            "initializer_range": shape.initializer_range,
        },
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype=shape.dtype,
        **whole,
    )


def mrope_section(head_dim: int) -> list[int]:
    """Frequency pairs for time, height, width: a quarter and the rest in halves, as [16, 24, 24] of head_dim 128."""
    pairs = head_dim // 2
    side = (pairs - pairs // 4) // 2
    return [pairs - 2 * side, side, side]


def build_tokenizer(vocab_size: int = 384, sentences: Sequence[str] = SENTENCES) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` tokens: 256 bytes, merges, Qwen's special tokens, the answer tags."""
    added = len(SPECIAL_TOKENS) + len(TAG_TOKENS)
    if vocab_size < 256 + added:
        raise ValueError(f"vocab_size={vocab_size} is too small; {256 + added} bytes and special tokens are the least")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer = _with_merges(tokenizer, vocab_size - added)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def _with_merges(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Sentences run out of merges long before a real vocabulary is full: words of small letters, aa to zzz…, make up for the rest."""
    content = json.loads(tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    letters = string.ascii_lowercase
    pairs = (("".join(head), last) for length in count(1) for *head, last in product(letters, repeat=length + 1))
    while len(vocab) < size:
        pair = next(pairs)
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    return Tokenizer.from_str(json.dumps(content))


def build_weights(
    config: Qwen2_5_VLConfig, seed: int = 0, randomize_all: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised transformers model in fp32; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
        if randomize_all:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # biases around 0, norm weights around 1
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _check_sizes(shape: TinyOptions) -> None:
    if shape.text_hidden % (2 * shape.text_heads):
        raise ValueError(f"text_hidden={shape.text_hidden} must be a multiple of 2 × text_heads={shape.text_heads}")
    if shape.text_heads % shape.kv_heads:
        raise ValueError(f"kv_heads={shape.kv_heads} must divide text_heads={shape.text_heads}")
    if shape.vision_hidden % (4 * shape.vision_heads):
        raise ValueError(
            f"vision_hidden={shape.vision_hidden} must be a multiple of 4 × vision_heads={shape.vision_heads}"
        )


def _write_processor_files(directory: Path, min_pixels: int, max_pixels: int) -> None:
    picture = {
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    video = picture | {"video_processor_type": "Qwen2VLVideoProcessor"}
    del video["image_processor_type"]
    for name, content in (("preprocessor_config.json", picture), ("video_preprocessor_config.json", video)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
