"""`eureka verify --against vllm`: log-probabilities of the native model at a layout against a rollout engine on the same checkpoint.

Three kinds of tokens are kept apart, because each points at another cause:

- `text`: of samples without a picture. Off here: the text model, its weights, the tokenizer.
- `near_picture`: the first `NEAR_TOKENS` behind a sample's last picture. Off here and not above: the vision tower, where its embeddings are
  placed, or the positions that pick up behind a picture.
- `after_picture`: the rest of such samples. Off here alone: what grows with length, such as positions or rounding.

The engine scores what follows the last picture of a sample (all but the first token where there is none). Differences are absolute, in nats.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eureka_megatron.types import Prompt, Sample
from eureka_megatron.verify.job import Job

KINDS = ("text", "near_picture", "after_picture")
NEAR_TOKENS = 8
# (largest, mean) difference in nats, by what both sides compute on and in. On GPUs: not yet run on hardware.
BARS = {
    ("cpu", "float32"): (1e-5, 1e-5),  # largest measured 9.6e-7 (tests/system/test_verify_engine.py)
    # Other kernels, and other orders of summation, on either side; attention in IEEE products, see `engine_logprobs`.
    ("cuda", "float32"): (1e-4, 1e-5),
    # Both sides round at every layer, each in its own way: one token may be far off, the mean may not. The bars are for models with the
    # large logits of training (bf16 values between 16 and 32 stand 0.125 apart). Measured on a tiny model: 3.9e-3, 1.2e-3.
    ("cpu", "bfloat16"): (0.5, 0.02),
    ("cuda", "bfloat16"): (0.5, 0.02),
}


def native_logprobs(rank: int, job: Job, address: str) -> list[list[float]] | None:
    """Of every token of the samples given those before it (the first: 0); on the rank that has them, None on the others."""
    trainer = job.trainer(rank, address)
    logprobs = trainer.logprobs(list(job.samples))
    if logprobs is None or trainer.parallel.tensor.rank or trainer.parallel.context.rank:
        return None
    return [row.tolist() for row in logprobs]


def engine_logprobs(hf_dir: Path | str, samples: Sequence[Sample], dtype: str = "float32") -> list[np.ndarray]:
    """float32, one array a sample: of its tokens from `first_scored` on, from a vLLM engine in this process."""
    if dtype == "float32":
        # vLLM's attention kernels leave the precision of fp32 products to Triton, which takes TF32 (10 bits) unless told otherwise.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    from eureka_megatron.data.processor import Processor
    from eureka_megatron.rollout.engine import Engine, EngineOptions

    # The pictures have passed this processor: within its bounds the engine leaves them as they are.
    bounds = Processor(hf_dir, min_pixels=None, max_pixels=None)
    engine = Engine(
        EngineOptions(
            model=hf_dir,
            dtype=dtype,
            max_model_tokens=max(map(len, samples)) + 1,
            max_concurrent=len(samples),
            min_pixels=bounds.min_pixels,
            max_pixels=bounds.max_pixels,
        )
    )
    starts = [first_scored(sample) for sample in samples]
    prompts = [
        Prompt(
            id=f"made-up-{number}",
            text="",  # the engine takes token ids
            answer="",
            tokens_S=sample.tokens_S[:start],
            positions_3S=sample.positions_3S[:, :start],
            pictures=sample.pictures,
            picture_offsets=sample.picture_offsets,
        )
        for number, (sample, start) in enumerate(zip(samples, starts, strict=True))
    ]
    return engine.score(prompts, [sample.tokens_S[start:] for sample, start in zip(samples, starts, strict=True)])


def first_scored(sample: Sample) -> int:
    """The token behind the end mark of the last picture; where there is none, the second token."""
    ends = [offset + p.units for offset, p in zip(sample.picture_offsets, sample.pictures, strict=True)]
    return max(ends, default=0) + 1


def differences(
    samples: Sequence[Sample], native: Sequence[Sequence[float]], engine: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """{kind: {"max", "mean", "tokens"}}; kinds without a token are left out."""
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for sample, ours, theirs in zip(samples, native, engine, strict=True):
        gap = np.abs(np.asarray(ours)[first_scored(sample) :] - theirs)
        gap[np.isnan(gap)] = np.inf
        if sample.pictures:
            found["near_picture"].append(gap[:NEAR_TOKENS])
            found["after_picture"].append(gap[NEAR_TOKENS:])
        else:
            found["text"].append(gap)
    together = {kind: np.concatenate(gaps) for kind, gaps in found.items() if gaps}
    return {
        kind: {"max": float(gap.max()), "mean": float(gap.mean()), "tokens": len(gap)}
        for kind, gap in together.items()
        if len(gap)
    }


def engine_report(job: Job, native: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Start the engine and compare."""
    figures = differences(job.samples, native, engine_logprobs(job.hf_dir, job.samples, job.execution.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest, mean = BARS[device, job.execution.dtype]
    return {
        "hf": job.hf_dir,
        "dtype": job.execution.dtype,
        "device": device,
        "against": "vllm",
        "figures": figures,
        "bars": {"max": largest, "mean": mean},
        "passed": all(gaps["max"] <= largest and gaps["mean"] <= mean for gaps in figures.values()),
    }
