"""`eureka verify`: the native model at a parallel layout against transformers, on the same checkpoint, in fp32.

Made-up samples (text only, one and several pictures of odd sizes, mixed) go through transformers one by one and through the native model
packed, on real ranks of the layout. Compared are the logits of every position, the loss, and with `grads` the gradient of every parameter,
the unclipped gradient norm and the weights after one SGD step. SGD and unclipped norms, because Adam and clipping hide errors of scale.
The weights must also come back bitwise through the table.

Every figure is max |a − b| / max |b| over one tensor; `BARS` says how large it may be.
"""

import json
import os
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eureka_megatron.config import OptimizerSection
from eureka_megatron.data.processor import Processor
from eureka_megatron.models.qwen2_5_vl.config import check_layout, read_hf_config
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.sync.source import hub_name
from eureka_megatron.types import Picture, Sample

BARS = {"logits": 1e-5, "loss": 1e-5, "gradients": 1e-5, "grad_norm": 1e-5, "sgd_step": 1e-5, "round_trip": 0.0}


@dataclass(frozen=True)
class Job:
    """What every rank needs to know. `reference` is the file of transformers' outputs on the samples, see `write_reference`."""

    hf_dir: str
    reference: str
    samples: tuple[Sample, ...]
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    grads: bool = True
    max_tokens: int = 4096

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def run_verify(
    hf_dir: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    sequence_parallel: bool = False,
    grads: bool = False,
    as_json: bool = False,
) -> int:
    """Print the figures. → exit code 0 when all are within their bars, else 1."""
    check_layout(read_hf_config(hf_dir), tensor, pipeline)
    with tempfile.TemporaryDirectory(prefix="eureka-verify-") as folder:
        reference = Path(folder) / "reference.safetensors"
        samples = made_up_samples(hf_dir)
        write_reference(hf_dir, reference, samples, grads=grads)
        job = Job(str(hf_dir), str(reference), tuple(samples), tensor, pipeline, data, sequence_parallel, grads)
        report_path = Path(folder) / "report.json"
        torch.multiprocessing.spawn(
            _spawned, args=(job, f"tcp://127.0.0.1:{_free_port()}", str(report_path)), nprocs=job.world_size
        )
        report = json.loads(report_path.read_text())
    print(json.dumps(report, indent=2) if as_json else describe(report))
    return 0 if report["passed"] else 1


def describe(report: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    lines = [f"{report['hf']} at {report['layout']}"]
    for name, value in report["figures"].items():
        where = f"  worst: {report['worst'][name]}" if name in report["worst"] else ""
        verdict = "ok" if value <= BARS[name] else "TOO LARGE"
        lines.append(f"  {name:<11} {value:.2e}  (bar {BARS[name]:.0e})  {verdict}{where}")
    return "\n".join([*lines, "passed" if report["passed"] else "FAILED"])


# ---- samples ---------------------------------------------------------------------------------------------------------


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


def reading_order(picture: Picture) -> torch.Tensor:
    """The patches as the image processor gave them: window order undone, merge unit by merge unit."""
    units = picture.patches_PD.unflatten(0, (picture.units, -1))
    restored = torch.empty_like(units)
    restored[torch.from_numpy(np.asarray(picture.unit_order_U))] = units
    return restored.flatten(0, 1)


# ---- reference -------------------------------------------------------------------------------------------------------


def write_reference(hf_dir: Path | str, output: Path, samples: list[Sample], *, grads: bool) -> None:
    """transformers' logits, loss and gradients of the samples, one at a time, as safetensors."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    image_token = model.config.image_token_id
    tokens_learned = sum(float(sample.mask_S[1:].sum()) for sample in samples)
    tensors: dict[str, torch.Tensor] = {}
    total = 0.0
    for index, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.tokens_S)[None]
        inputs: dict[str, Any] = {"input_ids": tokens, "mm_token_type_ids": (tokens == image_token).int()}
        if sample.pictures:
            inputs["pixel_values"] = torch.cat([reading_order(picture) for picture in sample.pictures])
            inputs["image_grid_thw"] = torch.tensor([picture.grid_thw for picture in sample.pictures])
        with torch.set_grad_enabled(grads):
            logits = model(**inputs, attention_mask=torch.ones_like(tokens)).logits[0]
            logprobs = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
            loss = -(logprobs * torch.from_numpy(sample.mask_S[1:])).sum() / tokens_learned
        if grads:
            loss.backward()
        total += loss.item()
        tensors[f"logits.{index}"] = logits.detach()
    tensors["loss"] = torch.tensor(total, dtype=torch.float64)
    if grads:
        tensors |= {f"grad.{hub_name(n)}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _spawned(rank: int, job: Job, address: str, report_path: str) -> None:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.world_size))
    report = measure(rank, job, address)
    if report is not None:
        Path(report_path).write_text(json.dumps(report))


def measure(rank: int, job: Job, address: str) -> dict[str, Any] | None:
    """All comparisons at this layout; called on every rank. → the report on rank 0, None elsewhere."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(
        job.tensor,
        job.pipeline,
        sequence_parallel=job.sequence_parallel,
        rank=rank,
        world_size=job.world_size,
        init_method=address,
    )
    reference, samples = load_file(job.reference), list(job.samples)
    section = OptimizerSection(name="sgd", lr=1.0, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
    trainer = PolicyTrainer(
        job.hf_dir, parallel, dtype="float32", optimizer=section, max_tokens_per_micro_batch=job.max_tokens
    )
    figures: dict[str, float] = {}
    worst: dict[str, str] = {}
    before = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
    logits = trainer.logits(samples)
    shared: dict[str, float] = {}
    if logits is not None:
        errors = [_relative(value.cpu(), reference[f"logits.{i}"]) for i, value in enumerate(logits)]
        shared["logits"] = max(errors)
    loss = trainer.accumulate(samples).get("loss")
    if loss is not None:
        shared["loss"] = abs(loss - reference["loss"].item()) / reference["loss"].item()
    figures |= _largest_over_ranks(shared, ("logits", "loss"))
    if job.grads:
        errors_by_name = _gradient_errors(trainer, reference)
        if errors_by_name:
            worst["gradients"], figures["gradients"] = max(errors_by_name.items(), key=lambda item: item[1])
        figures["grad_norm"], step_errors = _sgd_step(trainer, samples, section, reference, before)
        if step_errors:
            worst["sgd_step"], figures["sgd_step"] = max(step_errors.items(), key=lambda item: item[1])
    if rank:
        return None
    figures["round_trip"] = _round_trip(job.hf_dir, before)
    return {
        "hf": job.hf_dir,
        "layout": {
            "tp": job.tensor,
            "pp": job.pipeline,
            "dp": job.data,
            "sequence_parallel": job.sequence_parallel,
        },
        "figures": figures,
        "worst": worst,
        "bars": {name: BARS[name] for name in figures},
        "passed": all(figures[name] <= BARS[name] for name in figures),
    }


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a − b| / max |b|; NaN counts as infinite."""
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _largest_over_ranks(values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Ranks of the last stage know the figures; everyone else learns them."""
    table = torch.tensor([values.get(name, -1.0) for name in names], dtype=torch.float64)
    if torch.distributed.get_backend() == "nccl":
        table = table.cuda()
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(names, table.tolist(), strict=True))


def _gradient_errors(trainer: Any, reference: dict[str, torch.Tensor]) -> dict[str, float]:
    errors = {}
    for name, gradient in trainer.hf_weights(select=lambda parameter: parameter.main_grad):
        if gradient is not None:
            errors[name] = _relative(gradient.cpu(), reference[f"grad.{name}"])
    missing = {name.removeprefix("grad.") for name in reference if name.startswith("grad.")} - errors.keys()
    return errors | dict.fromkeys(missing if errors else (), float("inf"))


def _sgd_step(
    trainer: Any, samples: list[Sample], section: OptimizerSection, reference: dict[str, torch.Tensor], before: dict
) -> tuple[float, dict[str, float]]:
    """One step at a rate that moves the weights much further than they are large, so that rounding of the weights does not show."""
    norm = float(sum(t.double().square().sum() for n, t in reference.items() if n.startswith("grad.")) ** 0.5)
    size = float(sum(t.double().square().sum() for t in _file_tensors(trainer.model_path).values()) ** 0.5)
    rate = 1000 * size / norm
    trainer.start_phase(section.model_copy(update={"lr": rate}), 1)
    metrics = trainer.sft(samples)
    errors = {}
    for name, after in trainer.hf_weights():
        if after is not None:
            gradient = reference[f"grad.{name}"]
            expected = before[name] - rate * gradient.to(after.device)
            scale = (rate * gradient).abs().max().item()
            errors[name] = ((after - expected).abs().max() / scale).item()
    return abs(metrics["grad_norm"] - norm) / norm, errors


def _file_tensors(hf_dir: Path | str) -> dict[str, torch.Tensor]:
    files = sorted(Path(hf_dir).glob("*.safetensors"))
    return {hub_name(name): tensor for file in files for name, tensor in load_file(file).items()}


def _round_trip(hf_dir: Path | str, exported: dict[str, torch.Tensor]) -> float:
    """0.0 when every tensor of the checkpoint comes back bit for bit, else the number of tensors that do not."""
    original = _file_tensors(hf_dir)
    wrong = original.keys() ^ exported.keys()
    for name in original.keys() & exported.keys():
        back = exported[name].cpu().to(original[name].dtype)
        if not torch.equal(back, original[name]):
            wrong.add(name)
    return float(len(wrong))
