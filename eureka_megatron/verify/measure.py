"""The native model on the ranks of a layout, compared with transformers' outputs.

Made-up samples (text only, one and several pictures of odd sizes, mixed) go through transformers one by one and through the native model
packed, on real ranks of the layout. Compared are the logits of every position, the loss, and with `grads` the gradient of every parameter,
the unclipped gradient norm and the weights after one SGD step. SGD and unclipped norms, because Adam and clipping hide errors of scale.
The weights must also come back bitwise through the table. Along the depth of the model, `depths` says where a difference begins.

Every figure is max |a − b| / max |b| over one tensor; `BARS` says how large it may be.
"""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from eureka_megatron.config import OptimizerSection
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.verify.depths import NativeDepths, depth_errors, depth_names, relative
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.reference import Reference
from eureka_megatron.weights.table import hub_name

BARS = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-5, "grad_norm": 1e-5, "sgd_step": 1e-5, "round_trip": 0.0}


def measure(rank: int, job: Job, address: str) -> dict[str, Any] | None:
    """All comparisons at this layout; called on every rank. → the report on rank 0, None elsewhere."""
    reference, samples = Reference(job.reference), list(job.samples)
    section = OptimizerSection(name="sgd", lr=1.0, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
    trainer = job.trainer(rank, address, section)
    worst: dict[str, str] = {}
    before = on_host(trainer.hf_weights())
    with NativeDepths(trainer.chunks, trainer.parallel) as native:
        logits = trainer.logits(samples)
    depths = depth_errors(native, reference, depth_names(trainer.hf_config))
    shared: dict[str, float] = {}
    if logits is not None:
        errors = [relative(value.cpu(), reference[f"logits.{i}"]) for i, value in enumerate(logits)]
        shared["logits"] = max(errors)
    if job.grads:
        rate, norm = _rate_and_norm(trainer.model_path, reference)
        trainer.start_phase(section.model_copy(update={"lr": rate}), 1)
        metrics = trainer.sft(samples)
        compared = {
            "gradients": _gradient_errors(trainer, reference),
            "sgd_step": _step_errors(trainer, reference, before, rate),
        }
    else:
        metrics, compared = trainer.accumulate(samples), {}
    if "loss" in metrics:
        shared["loss"] = abs(metrics["loss"] - reference["loss"].item()) / reference["loss"].item()
    figures = largest_over_ranks(shared, ("logits", "loss"))
    for figure, errors_by_name in compared.items():
        if errors_by_name:
            worst[figure], figures[figure] = max(errors_by_name.items(), key=lambda item: item[1])
    if job.grads:
        figures["grad_norm"] = abs(metrics["grad_norm"] - norm) / norm
    if rank:
        return None
    figures["round_trip"] = round_trip(job.hf_dir, before)
    depths["lm_head"] = figures["logits"]
    begins = next((name for name, error in depths.items() if error > BARS["logits"]), None)
    return report_of(job, figures, BARS, worst=worst, depths=depths, begins=begins)


def report_of(job: Job, figures: Mapping[str, float], bars: Mapping[str, float], **further: Any) -> dict[str, Any]:
    """The figures beside the bars that none of them may exceed, and whatever else is told."""
    return {
        "hf": job.hf_dir,
        "dtype": job.execution.dtype,
        "figures": figures,
        "bars": {name: bars[name] for name in figures},
        **further,
        "passed": all(figures[name] <= bars[name] for name in figures),
    }


def on_host(weights: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """Copies of the tensors that this rank receives, in host memory: a whole model in fp32 has no room beside its share on the GPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in weights if tensor is not None}


def gradients_of(trainer: PolicyTrainer) -> Iterable[tuple[str, torch.Tensor | None]]:
    """Those that the last step was made with, by hub name; None where this rank does not receive them."""
    return trainer.hf_weights(select=attrgetter("main_grad"))


def largest_over_ranks(values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Ranks of the last stage know the figures; everyone else learns them."""
    table = torch.tensor([values.get(name, -1.0) for name in names], dtype=torch.float64)
    if torch.distributed.get_backend() == "nccl":
        table = table.cuda()
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(names, table.tolist(), strict=True))


def _rate_and_norm(model_path: Path, reference: Reference) -> tuple[float, float]:
    """→ a rate that moves every tensor much further than it is large, so that rounding of the weights does not show; the gradient's norm."""
    weights, square, rate = _file_tensors(model_path), 0.0, 0.0
    for name in reference.gradient_names:
        gradient = reference[f"grad.{name}"]
        square += gradient.double().square().sum().item()
        if largest := gradient.abs().max().item():
            rate = max(rate, 1000 * weights[name].abs().max().item() / largest)
    return rate, square**0.5


def _gradient_errors(trainer: PolicyTrainer, reference: Reference) -> dict[str, float]:
    """Of the gradients that the last step was made with."""
    errors = {
        name: relative(gradient.cpu(), reference[f"grad.{name}"])
        for name, gradient in gradients_of(trainer)
        if gradient is not None
    }
    missing = set(reference.gradient_names) - errors.keys()
    return errors | dict.fromkeys(missing if errors else (), float("inf"))


def _step_errors(
    trainer: PolicyTrainer, reference: Reference, before: dict[str, torch.Tensor], rate: float
) -> dict[str, float]:
    errors = {}
    for name, after in trainer.hf_weights():
        if after is not None:
            step = -rate * reference[f"grad.{name}"].to(after.device)
            # The weight that was expected, not the difference of weights: rounding of the start must not show.
            errors[name] = relative(after, before[name].to(after.device) + step, scale=step)
    return errors


def _file_tensors(hf_dir: Path | str) -> dict[str, torch.Tensor]:
    files = sorted(Path(hf_dir).glob("*.safetensors"))
    return {hub_name(name): tensor for file in files for name, tensor in load_file(file).items()}


def round_trip(hf_dir: Path | str, exported: dict[str, torch.Tensor]) -> float:
    """0.0 when every tensor of the checkpoint comes back bit for bit, else the number of tensors that do not."""
    original = _file_tensors(hf_dir)
    wrong = original.keys() ^ exported.keys()
    for name in original.keys() & exported.keys():
        if not torch.equal(exported[name], original[name].to(exported[name].dtype)):
            wrong.add(name)
    return float(len(wrong))
