"""Forward and backward: the native model on packed rows against transformers' Qwen2.5-VL, on the same weights, samples, loss and threads.

    python tools/benchmark/train.py [--rounds 5] [--threads N] [--size medium] [--only uneven|rl] [--json FILE]

uneven: eight samples with pictures of 6 to 100 embeddings and responses of 32 to 256 tokens; transformers padded to one batch, and one
sample at a time. rl: eight responses of 64 tokens or a few less that share a prompt of 256 tokens with a picture of 64; transformers padded, each copy
of the picture seen again, as trainers on top of it do. All in fp32; transformers with `sdpa` attention, its fastest here.

Before anything is timed, loss and gradient norm of both must agree to 1e-5. Then all take turns. A token is one of a sample, placeholders included,
padding not. The share of the matrix rate divides the operations that the samples need one by one (a shared prompt counts for every sample) by the time and by the rate of products of
1024 × 1024 fp32 matrices measured between the turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Result, arguments, build_model, in_turns, matrix_rate, median_ratio, report
from PIL import Image
from torch.nn import functional

from eureka_megatron.config import OptimizerSection
from eureka_megatron.data.model_inputs import model_inputs
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.samples import training_sample
from eureka_megatron.layout import Execution
from eureka_megatron.models.qwen2_5_vl.operations import update_operations
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.types import Prompt, Sample
from eureka_megatron.verify.measure import gradients_of

PICTURES = ((2, 3), (8, 8), (4, 5), (6, 6), (3, 4), (10, 10), (5, 5), (8, 4))  # height and width in embeddings
RESPONSES = tuple(range(32, 257, 32))
PROMPT_TOKENS, RL_PICTURE, RL_RESPONSES = 256, (8, 8), (64, 61, 64, 58, 64, 63, 60, 64)
SAME = 1e-5
GOALS = {"padded": {"uneven": 1.7, "rl": 2.5}, "one at a time": {"uneven": 1.15}}
SHARE_GOAL = 0.7


# --- samples ---


def made_up_prompt(processor: Processor, folder: Path, name: str, size: tuple[int, int], text: str) -> Prompt:
    pixels = np.random.default_rng(len(text)).integers(0, 256, (28 * size[0], 28 * size[1], 3), dtype=np.uint8)
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": text}]
    return processor.prompt([{"role": "user", "content": content}], id=name, folders=(folder,))


def random_responses(lengths: Sequence[int]) -> list[np.ndarray]:
    """Of bytes, never a token with a meaning."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, length) for length in lengths]


def uneven_samples(processor: Processor, folder: Path) -> list[Sample]:
    prompts = [made_up_prompt(processor, folder, str(n), size, f"How many? {n}") for n, size in enumerate(PICTURES)]
    order = (3, 0, 6, 1, 7, 4, 2, 5)  # long responses go with pictures of any size
    responses = random_responses([RESPONSES[place] for place in order])
    return [training_sample(prompt, tokens) for prompt, tokens in zip(prompts, responses, strict=True)]


def rl_samples(processor: Processor, folder: Path) -> list[Sample]:
    """All of one prompt: their prompt arrays are equal, and so is the picture."""
    text = "?"
    short = len(made_up_prompt(processor, folder, "rl", RL_PICTURE, text).tokens_S)
    prompt = made_up_prompt(processor, folder, "rl", RL_PICTURE, "7" * (PROMPT_TOKENS - short) + text)
    assert len(prompt.tokens_S) == PROMPT_TOKENS, len(prompt.tokens_S)
    return [training_sample(prompt, tokens) for tokens in random_responses(RL_RESPONSES)]


# --- the two sides: each sets gradients and returns the loss ---


def native(model_dir: Path, folder: Path) -> PolicyTrainer:
    parallel = init_parallel(rank=0, world_size=1, init_method=f"file://{folder}/rendezvous")
    return PolicyTrainer(model_dir, parallel, Execution(), optimizer=OptimizerSection(name="sgd"))


class Transformers:
    """Its model, and the token mean of the negative log-probabilities of responses as the loss."""

    def __init__(self, model_dir: Path, image_token: int) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.image_token = image_token

    def one_at_a_time(self, samples: Sequence[Sample]) -> float:
        self.model.zero_grad()
        tokens = sum(float(sample.mask_S.sum()) for sample in samples)
        return sum(self._learn(self._padded([sample]), tokens) for sample in samples)

    def padded(self, samples: Sequence[Sample]) -> float:
        self.model.zero_grad()
        return self._learn(self._padded(samples), sum(float(sample.mask_S.sum()) for sample in samples))

    def _learn(self, inputs: dict[str, Any], tokens: float) -> float:
        mask_BS, labels_BS = inputs.pop("mask_BS")[:, 1:], inputs["input_ids"][:, 1:]
        logits_BSV = self.model(**inputs).logits[:, :-1]
        loss = functional.cross_entropy(logits_BSV[mask_BS], labels_BS[mask_BS], reduction="sum") / tokens
        loss.backward()
        return loss.item()

    def _padded(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch, padded on the right."""
        longest = max(map(len, samples))
        inputs = [model_inputs(sample, self.image_token) for sample in samples]

        def lay(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([functional.pad(value, (0, longest - value.shape[1])) for value in values])

        found = {name: lay([one[name] for one in inputs]) for name in ("input_ids", "mm_token_type_ids")}
        found["attention_mask"] = lay([torch.ones_like(one["input_ids"]) for one in inputs])
        found["mask_BS"] = lay([torch.from_numpy(sample.mask_S)[None] > 0 for sample in samples])
        for name in ("pixel_values", "image_grid_thw"):
            found[name] = torch.cat([one[name] for one in inputs])
        return found

    def gradient_norm(self) -> float:
        return norm(parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)


def norm(tensors: Any) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def check_equal(trainer: PolicyTrainer, theirs: Transformers, samples: Sequence[Sample]) -> None:
    """Loss and gradient norm of all ways to compute them."""
    loss = trainer.accumulate(samples)["loss"]
    own = {
        "loss": loss,
        "gradient norm": norm(gradient for _, gradient in gradients_of(trainer) if gradient is not None),
    }
    for name, way in (("padded", theirs.padded), ("one at a time", theirs.one_at_a_time)):
        found = {"loss": way(samples), "gradient norm": theirs.gradient_norm()}
        for what, value in found.items():
            if abs(value - own[what]) > SAME * abs(value):
                raise SystemExit(f"{what} differs: {own[what]:.8f} packed, {value:.8f} {name} in transformers")
    print(
        f"equal to {SAME:g} on both sides: loss {own['loss']:.6f}, gradient norm {own['gradient norm']:.6f}", flush=True
    )


# --- the comparison ---


def compare(
    kind: str, trainer: PolicyTrainer, theirs: Transformers, samples: Sequence[Sample], rounds: int
) -> list[Result]:
    tasks: dict[str, Callable[[], object]] = {"packed": lambda: trainer.accumulate(samples)}
    tasks["padded"] = lambda: theirs.padded(samples)
    if kind == "uneven":
        tasks["one at a time"] = lambda: theirs.one_at_a_time(samples)
    rates: list[float] = []
    seconds = in_turns(tasks | {"matrix": lambda: rates.append(matrix_rate())}, rounds)
    tokens, rate = sum(map(len, samples)), median(rates)
    filled = tokens / (len(samples) * max(map(len, samples)))
    print(f"{kind}: {tokens} tokens in {len(samples)} samples ({filled:.0%} of the padded batch)", flush=True)
    operations = update_operations(trainer.hf_config, [[sample] for sample in samples], frozen_tower=False)
    shares = {name: operations / median(seconds[name]) / rate for name in tasks}
    for name in tasks:
        print(
            f"  {name:14}{median(seconds[name]):7.3f} s {tokens / median(seconds[name]):7.0f} tokens/s, {shares[name]:.2f} of the matrix rate"
        )
    details = {
        "tokens": tokens,
        "tokens_per_second": {name: round(tokens / median(seconds[name])) for name in tasks},
        "matrix_gflops": round(rate / 1e9, 1),
        "share_of_matrix_rate": {name: round(share, 3) for name, share in shares.items()},
        "seconds": {name: [round(value, 4) for value in seconds[name]] for name in tasks},
    }
    where = (
        f"packing alone gains {1 / filled:.2f} on this batch; with its padding transformers reaches {shares['padded'] / filled:.2f} "
        f"of the matrix rate, ours {shares['packed']:.2f}; the rest is norms, rotations, activations and softmax (docs/performance.md)"
    )
    found = []
    for name in list(tasks)[1:]:
        peer = (
            f"transformers {tokens / median(seconds[name]):.0f} tokens/s, ours {tokens / median(seconds['packed']):.0f}"
        )
        ratio = median_ratio(seconds[name], seconds["packed"])
        found.append(
            Result(
                f"forward + backward, {kind}, against {name}",
                ratio,
                "×",
                GOALS[name].get(kind),
                peer=peer,
                details=details,
                where=where,
            )
        )
    share = Result(
        f"forward + backward, {kind}: share of the matrix rate",
        shares["packed"],
        goal=SHARE_GOAL if kind == "uneven" else None,
        peer=f"padded {shares['padded']:.2f}; matrices {rate / 1e9:.0f} GFLOP/s",
        details=details,
        where=where,
    )
    return [*found, share]


def main() -> None:
    parser = arguments(__doc__, rounds=5, threads=True)
    parser.add_argument("--size", choices=("tiny", "medium"), default="medium")
    parser.add_argument("--only", choices=("uneven", "rl"))
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory(prefix="train-") as name:
        folder = Path(name)
        model_dir = build_model(folder / "model", options.size)
        processor = Processor(model_dir, min_pixels=None, max_pixels=None, max_prompt_tokens=4096)
        trainer, theirs = native(model_dir, folder), Transformers(model_dir, processor.image_token_id)
        parameters = sum(weight.numel() for weight in theirs.model.parameters())
        print(f"{parameters / 1e6:.1f} M parameters, {options.threads} threads", flush=True)
        for kind, make in (("uneven", uneven_samples), ("rl", rl_samples)):
            if options.only in (None, kind):
                samples = make(processor, folder)
                check_equal(trainer, theirs, samples)
                results += compare(kind, trainer, theirs, samples, options.rounds)
    report(results, options.json)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
