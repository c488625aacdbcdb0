"""For tests with real engines: a private Ray, prompts over made-up pictures, and transformers as the judge of log-probabilities."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.sync.source import MegatronWeightSource, TensorMeta
from eureka_megatron.types import Picture, Prompt
from eureka_megatron.weights.table import hub_name

MERGED_PATCH = 28  # pixels a side of one vision embedding


@contextmanager
def private_ray(cpus: int = 2, store_mib: int = 256, gpus: int = 0) -> Iterator[None]:
    """A Ray instance of this process only, with a bounded object store. It believes to have `gpus` GPUs."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # as start_ray has it: the workers are the job
    with tempfile.TemporaryDirectory(prefix="eureka-", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=store_mib << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def wait_until(happened: Callable[[], Any], seconds: float = 120.0) -> None:
    """Looks again and again, at most so long."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def run_config(model: Path, sections: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    """A configuration for a tiny model in fp32 with short sequences; `sections` besides those set here."""
    return make_config(
        {
            **(sections or {}),
            "model": {"path": str(model), "dtype": rollout.pop("dtype", "float32")},
            "data": {"train": "unused.jsonl", "min_pixels": 28 * 28, "max_prompt_tokens": 128},
            "rollout": {
                "kv_cache_gib": 0.25,
                "max_concurrent": 64,
                "max_model_tokens": 512,
                "max_response_tokens": 384,
                "samples_per_prompt": 2,
                **rollout,
            },
            "training": {"prompts_per_step": 4, "responses_per_update": 8},
        }
    )


def noise_picture(seed: int, rows: int = 3, columns: int = 3) -> Picture:
    """Random pixels of rows × columns merge units. Only what an engine needs is real; there are no patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * MERGED_PATCH, columns * MERGED_PATCH, 3), np.uint8)
    patches = 4 * rows * columns
    return Picture(
        key=f"noise-{seed}-{rows}x{columns}",
        image=Image.fromarray(pixels),
        grid_thw=(1, 2 * rows, 2 * columns),
        patches_PD=torch.empty(0, 1176),
        coordinates_P2=np.zeros((0, 2), dtype=np.int64),
        unit_order_U=np.arange(rows * columns),
        window_lengths_W=np.array([patches]),
        frame_lengths_F=np.array([patches]),
    )


class Prompts:
    """Makes prompts as the processor does, for the tokenizer and template in `directory`."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.placeholder = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def make(self, name: str, question: str, pictures: Sequence[Picture] = ()) -> Prompt:
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        tokens: list[int] = []
        offsets, remaining = [], list(pictures)
        for token in self.tokenizer(text)["input_ids"]:
            if token == self.placeholder:
                offsets.append(len(tokens))
                tokens += [token] * remaining.pop(0).units
            else:
                tokens.append(token)
        return Prompt(
            id=name,
            text=text,
            answer="3",
            tokens_S=np.array(tokens, dtype=np.int64),
            positions_3S=np.tile(np.arange(len(tokens)), (3, 1)),
            pictures=tuple(pictures),
            picture_offsets=tuple(offsets),
        )

    def mixture(self) -> list[Prompt]:
        """One picture, two pictures of odd sizes, none."""
        return [
            self.make("one", "How many circles are there?", [noise_picture(1)]),
            self.make("two", "How many squares are there?", [noise_picture(2, 5, 7), noise_picture(3, 1, 4)]),
            self.make("none", "How many more circles than squares are there?"),
        ]


@torch.no_grad()
def reference_logprobs(
    model: Any, directory: Path, prompt: Prompt, tokens_R: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """float32 [R]: transformers' log-probabilities of the response tokens, pictures through its own image processor."""
    from transformers import AutoImageProcessor

    tokens = torch.from_numpy(np.concatenate([prompt.tokens_S, tokens_R]))[None]
    extra: dict[str, Any] = {}
    if prompt.pictures:
        processor = AutoImageProcessor.from_pretrained(directory)
        extra = dict(processor([picture.image for picture in prompt.pictures], return_tensors="pt"))
        is_picture = torch.zeros_like(tokens)
        for picture, offset in zip(prompt.pictures, prompt.picture_offsets, strict=True):
            is_picture[0, offset : offset + picture.units] = 1
        extra["mm_token_type_ids"] = is_picture  # without it transformers silently falls back to 1-D positions
    logits = model(input_ids=tokens, **extra).logits[0].float()
    scores = torch.log_softmax(logits[len(prompt.tokens_S) - 1 : -1] / temperature, dim=-1)
    return scores.gather(1, torch.tensor(tokens_R)[:, None])[:, 0].numpy()


def load_reference(directory: Path) -> Any:
    """transformers' model of a directory, in fp32, for scoring and as the trainer's side of a weight sync."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def worst(
    model: Any, directory: Path, prompts: Sequence[Prompt], groups: Sequence[Any], temperature: float = 1.0
) -> float:
    """Largest difference between the rollouts' log-probabilities and transformers'."""
    return max(
        float(
            np.abs(
                reference_logprobs(model, directory, prompt, rollout.tokens_R, temperature) - rollout.logprobs_R
            ).max()
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for rollout in group.rollouts
    )


def score(
    pool: Any, prompts: Sequence[Prompt], responses: Sequence[np.ndarray], temperature: float = 1.0
) -> list[np.ndarray]:
    """float32 [R] each: the first engine's log-probabilities of given responses, see Engine.score."""
    part = [prompt.without_patches() for prompt in prompts]
    return pool._result(pool.actors[0].score.remote(part, list(responses), temperature), 0, pool.actors[0], None)


def module_source(module: torch.nn.Module, *, dtype: torch.dtype | None = None) -> MegatronWeightSource:
    """A source over a transformers model in this process, under hub names; tied weights once."""
    named = [(hub_name(name), parameter) for name, parameter in module.named_parameters()]
    declared = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]
    return MegatronWeightSource(lambda: named, declared, dtype=dtype)
