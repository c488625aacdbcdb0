"""The native model in bf16, the way it trains, measured by how far transformers in bf16 is off.

No two programs round alike, so a fixed bar for bf16 would be blind or wrong. What a bf16 model should compute is known, though:
transformers in fp32 on the same, rounded, weights. Both bf16 models are compared with that, on the same samples, and the native one may
be at most a factor (`FACTORS`) further off than transformers is itself. The other way round, what this cannot see: an error that is
small beside rounding.

Errors are ‖a − b‖ / ‖b‖ with b in fp32, unless it is said otherwise:

- `logits`: of all positions of all samples together.
- `logprobs`: of all tokens together, in the code path that trains; root of the mean square, in nats.
- `loss`: absolute. A mean over tokens is not further off than the tokens are: transformers' figure is that of the learned tokens.
- `worst_module`: of what leaves one module, or what an attention adds, the largest over the samples, where it exceeds transformers' most.
- with gradients, `gradients`: of all parameters together. `worst_gradient`: of the parameter where it exceeds transformers' most.
  `grad_norm`: transformers' figure is that of its gradients, for the reason that the loss has.
- `round_trip`: tensors of the checkpoint, in bf16, that do not come back bit for bit: none.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eureka_megatron.config import OptimizerSection
from eureka_megatron.types import Sample
from eureka_megatron.verify.depths import NativeDepths, depth_errors, depth_names, distance
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.measure import gradients_of, largest_over_ranks, on_host, report_of, round_trip
from eureka_megatron.verify.reference import Reference, write_reference

# In merge units. Some are long, for what bf16 does to the angle of a rotary embedding grows with the position.
PICTURES = (((3, 3),), (), ((120, 1),), ((2, 90), (4, 8)), ())

# Largest measured over tiny models, tied or not, with flat and with sharp attention, at the layouts of tests/parity/test_rounding.py (which
# prints them): logits 1.01, log-probabilities 1.09, modules 1.24, gradients 0.99, one parameter 2.3 (a key bias, where the gradient of any
# weight is rounding for the most part). Not yet run on hardware.
FACTORS = {
    "logits": 1.5,
    "logprobs": 1.5,
    "loss": 1.5,
    "worst_module": 1.5,
    "gradients": 1.5,
    "grad_norm": 1.5,
    "worst_gradient": 3.0,
}

Squares = Mapping[str, tuple[float, float]]  # parameter → (‖a − b‖², ‖b‖²)


def write_rounded_references(job: Job) -> None:
    """Both of transformers' files: `job.reference` in fp32 on the rounded weights, `job.rounded` in the job's dtype."""
    dtype, samples = getattr(torch, job.execution.dtype), list(job.samples)
    write_reference(job.hf_dir, Path(job.reference), samples, grads=job.grads, weights=dtype)
    write_reference(job.hf_dir, Path(job.rounded), samples, grads=job.grads, weights=dtype, dtype=dtype)


def measure_rounding(rank: int, job: Job, address: str) -> dict[str, Any] | None:
    """All comparisons at this layout; called on every rank. → the report on rank 0, None elsewhere."""
    exact, rounded, samples = Reference(job.reference), Reference(job.rounded), list(job.samples)
    section = OptimizerSection(name="sgd", lr=1e-6, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
    trainer = job.trainer(rank, address, section)
    weights = on_host(trainer.hf_weights())
    names = depth_names(trainer.hf_config, attention=True)
    with NativeDepths(trainer.chunks, trainer.parallel, attention=True) as native:
        logits = trainer.logits(samples)
    depths = depth_errors(native, exact, names, distance)
    logprobs = trainer.logprobs(samples)
    ours: dict[str, float] = {}
    if logits is not None and logprobs is not None:
        ours = _forward_errors([rows.cpu() for rows in logits], [rows.cpu()[1:] for rows in logprobs], exact)
    if job.grads:
        trainer.start_phase(section, 1)
        metrics = trainer.sft(samples)
    else:
        metrics = trainer.accumulate(samples)
    if "loss" in metrics:
        ours["loss"] = abs(metrics["loss"] - exact["loss"].item())
    ours = largest_over_ranks(ours, ("logits", "logprobs", "loss"))
    gradients = _squares(gradients_of(trainer), exact) if job.grads else {}
    if rank:
        return None
    outputs = {kind: [rounded[f"{kind}.{i}"] for i in range(len(samples))] for kind in ("logits", "logprobs")}
    theirs = _forward_errors(outputs["logits"], outputs["logprobs"], exact)
    theirs["loss"] = _learned_tokens_error(rounded, exact, samples)
    of_depths = {name: _depth_error(name, rounded, exact, len(samples)) for name in names}
    worst = {"worst_module": _furthest(depths, of_depths)}
    if job.grads:
        reference = _squares(((name, rounded[f"grad.{name}"]) for name in exact.gradient_names), exact)
        own_errors, errors = _errors(gradients, reference), _errors(reference, reference)
        worst["worst_gradient"] = _furthest(own_errors, errors)
        ours |= {"gradients": own_errors[""], "worst_gradient": own_errors[worst["worst_gradient"]]}
        theirs |= {"gradients": errors[""], "worst_gradient": errors[worst["worst_gradient"]]}
        norm = sum(square for _, square in reference.values()) ** 0.5
        ours["grad_norm"], theirs["grad_norm"] = abs(metrics["grad_norm"] - norm) / norm, theirs["gradients"]
    ours["worst_module"], theirs["worst_module"] = (of[worst["worst_module"]] for of in (depths, of_depths))
    bars = {name: FACTORS[name] * theirs[name] for name in ours} | {"round_trip": 0.0}
    figures = ours | {"round_trip": round_trip(job.hf_dir, weights)}
    allowed = FACTORS["worst_module"]
    return report_of(
        job,
        figures,
        bars,
        transformers=theirs,
        worst=worst,
        depths=depths,
        depths_transformers=of_depths,
        begins=next((name for name in names if depths[name] > allowed * of_depths[name]), None),
    )


def _forward_errors(logits: Sequence[Tensor], logprobs: Sequence[Tensor], exact: Reference) -> dict[str, float]:
    """Of logits, one [S, V] a sample, and of log-probabilities, one [S − 1] a sample."""
    expected = torch.cat([exact[f"logprobs.{i}"] for i in range(len(logprobs))])
    return {
        "logits": distance(torch.cat(list(logits)), torch.cat([exact[f"logits.{i}"] for i in range(len(logits))])),
        "logprobs": distance(torch.cat(list(logprobs)), expected) * expected.double().square().mean().sqrt().item(),
    }


def _learned_tokens_error(rounded: Reference, exact: Reference, samples: Sequence[Sample]) -> float:
    """Root of the mean square over the tokens that the loss counts, in nats."""
    masks = [torch.from_numpy(sample.mask_S[1:]).double() for sample in samples]
    off = [(rounded[f"logprobs.{i}"] - exact[f"logprobs.{i}"]).double().square() @ mask for i, mask in enumerate(masks)]
    return (sum(square.item() for square in off) / sum(mask.sum().item() for mask in masks)) ** 0.5


def _depth_error(name: str, rounded: Reference, exact: Reference, samples: int) -> float:
    """Transformers' own, as `depth_errors` has it."""
    keys = [key for i in range(samples) if (key := f"depth.{i}.{name}") in exact]
    return max((distance(rounded[key], exact[key]) for key in keys), default=0.0)


def _squares(found: Iterable[tuple[str, Tensor | None]], exact: Reference) -> Squares:
    """Of the gradients that this rank receives; one that is no number is infinitely far off."""
    squares = {}
    for name, gradient in found:
        if gradient is not None:
            expected = exact[f"grad.{name}"].double()
            off = (gradient.cpu().double() - expected).square().sum().item()
            squares[name] = (off if off == off else float("inf"), expected.square().sum().item())
    return squares


def _errors(found: Squares, reference: Squares) -> dict[str, float]:
    """By parameter, and of all together under ""; infinite where one is missing."""
    pairs = {
        name: (found[name][0] if name in found else float("inf"), square) for name, (_, square) in reference.items()
    }
    pairs[""] = (sum(off for off, _ in pairs.values()), sum(square for _, square in pairs.values()))
    return {name: (off / max(square, 1e-60)) ** 0.5 for name, (off, square) in pairs.items()}


def _furthest(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Where our error exceeds transformers' by the largest factor."""
    return max(filter(None, theirs), key=lambda name: ours[name] / max(theirs[name], 1e-30))
