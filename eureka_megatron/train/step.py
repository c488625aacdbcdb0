"""Micro-batches through Megatron's pipeline schedule: forward only, or forward, backward and one optimizer step.

The loss of a micro-batch is its share of the global loss: its denominator was fixed from the whole update before the first forward.
Gradients are therefore summed over micro-batches and data-parallel ranks and never averaged, and an update does not depend on
packing, micro-batch size or data parallelism.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from eureka_megatron.errors import ConfigError
from eureka_megatron.parallel import runtime
from eureka_megatron.parallel.collectives import gather_rows
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.rl.logprobs import token_logits, token_logprobs
from eureka_megatron.rl.losses import LossInputs, Metrics, add_metrics, policy_loss
from eureka_megatron.rl.shaping import Shaping
from eureka_megatron.train.parcel import Update
from eureka_megatron.train.pipeline import communication
from eureka_megatron.types import ContextShare, MicroBatch, VisionBatch

Record = TypeVar("Record", bound=MicroBatch | VisionBatch | ContextShare)
# (hidden states [T, H], output weight, micro-batch) → (loss, metrics); called on the last stage only.
LossFunction = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Objective:
    """What the updates of a rollout step minimise.

    Attributes:
        loss, options, compat: see rl.losses.policy_loss.
        passes: how often the step's updates are made.
        shaping: see rl.shaping; None: the samples' advantages stay.
        temperature: of the policy softmax(logits / temperature), that which was sampled: all log-probabilities, ratios, KL terms,
            entropies and gradients are its own.
    """

    loss: str
    options: Mapping[str, Any]
    compat: str | None = None
    passes: int = 1
    shaping: Shaping | None = None
    temperature: float = 1.0


def run_schedule(
    chunks: list[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    loss: LossFunction,
    parallel: Parallel,
    *,
    forward_only: bool,
) -> list[Metrics]:
    """Every micro-batch through all stages. → the metrics of each on the last stage, an empty list elsewhere.

    Without `forward_only` the gradients of all chunks' parameters are complete afterwards: summed over data-parallel ranks, over
    sequence-parallel norms and tied embeddings.
    """
    config = chunks[0].config
    if len(chunks) > 1 and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        # Stages that exchange tensors both ways at once confuse them, and the losses are wrong without an error.
        raise ConfigError(
            "a virtual pipeline needs overlap_p2p_comm=True and batch_p2p_comm=False in its TransformerConfig"
        )
    config.finalize_model_grads_func = partial(_finalize, parallel=parallel)

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        micro_batch = next(iterator)
        core = unwrap_model(model)
        if not core.pre_process:
            micro_batch = replace(micro_batch, vision=None)
        micro_batch = to_device(micro_batch, parallel.device, config.params_dtype)

        def loss_of(hidden_TH: Tensor) -> tuple[Tensor, Tensor, Metrics]:
            weight = core.output_weight()
            # Float16Module hands the last stage's output out in fp32, having computed it in bf16: nothing is lost by going back.
            value, metrics = loss(hidden_TH.to(weight.dtype), weight, micro_batch)
            return value, torch.zeros((), dtype=torch.int, device=value.device), metrics

        return model(micro_batch), loss_of

    longest = max(micro_batch.tokens for micro_batch in micro_batches)
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            # Interleaved schedules want one iterator a chunk; all chunks see all micro-batches.
            data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=longest,  # an upper bound only: see train.pipeline
            micro_batch_size=1,
            forward_only=forward_only,
            **communication(config, micro_batches, parallel),
        )


def _finalize(
    chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, *, parallel: Parallel, **options: object
) -> None:
    """Megatron's reduction of gradients, without its division by tokens: the loss is already divided."""
    core = unwrap_model(chunks[0])
    if core.pre_process and core.vision_parallel == "data" and parallel.tensor.size > 1:
        # Each tensor-parallel rank saw its share of the pictures; Megatron adds gradients over data-parallel ranks only.
        for parameter in core.vision.parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.main_grad, group=parallel.tensor.group)
    finalize_model_grads(chunks, None, **options)


def to_device(record: Record, device: torch.device, dtype: torch.dtype) -> Record:
    """The record with all its tensors on the device and what pictures are made of end to end; patches in `dtype`, the tower's."""
    moved: dict[str, Any] = {}
    for name in record.__dataclass_fields__:
        value = getattr(record, name)
        if isinstance(value, Tensor):
            moved[name] = runtime.to_device(value, device)
        elif isinstance(value, VisionBatch | ContextShare):
            moved[name] = to_device(value, device, dtype)
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            moved[name] = runtime.join_on_device(value, device, dtype if name == "patches_PD" else value[0].dtype)
    return replace(record, **moved)


def row_logprobs(
    hidden_tH: Tensor, weight_VH: Tensor, batch: MicroBatch, parallel: Parallel, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each row's label, fp32 [T]: of the whole packed row on every rank.

    Context-parallel ranks compute their own rows and exchange the results, so that a loss may look at whole sequences. All of them then
    compute the same loss and keep the gradient of their own rows.
    """
    share = batch.context
    labels = batch.labels_T if share is None else batch.labels_T[share.rows_t]
    logprobs, entropy = token_logprobs(
        hidden_tH, weight_VH, labels, group=parallel.tensor.group, temperature=temperature
    )
    if share is None:
        return logprobs, entropy
    logprobs, entropy = gather_rows(torch.stack((logprobs, entropy), dim=1), share.order_T, parallel.context).unbind(1)
    return logprobs, entropy


def logprobs_only(
    hidden_TH: Tensor, weight_VH: Tensor, batch: MicroBatch, *, parallel: Parallel, temperature: float = 1.0
) -> tuple[Tensor, Metrics]:
    """A `LossFunction` that only reports: metrics "logprobs_T" and "entropy_T"."""
    logprobs, entropy = row_logprobs(hidden_TH, weight_VH, batch, parallel, temperature)
    return logprobs.sum(), {"logprobs_T": logprobs.detach(), "entropy_T": entropy.detach()}


def full_logits(
    hidden_TH: Tensor, weight_VH: Tensor, batch: MicroBatch, *, parallel: Parallel
) -> tuple[Tensor, Metrics]:
    """A `LossFunction` that reports the logits of the whole vocabulary, "logits_TV" in fp32. For checks of small models only."""
    logits = token_logits(hidden_TH, weight_VH)
    parts = [torch.empty_like(logits) for _ in range(parallel.tensor.size)]
    if parallel.tensor.size > 1:
        dist.all_gather(parts, logits.contiguous(), group=parallel.tensor.group)
        logits = torch.cat(parts, dim=-1)
    if batch.context is not None:
        logits = gather_rows(logits, batch.context.order_T, parallel.context)
    return logits.sum(), {"logits_TV": logits.detach()}


def supervised_loss(
    hidden_TH: Tensor, weight_VH: Tensor, batch: MicroBatch, *, parallel: Parallel, global_tokens: float
) -> tuple[Tensor, Metrics]:
    """Mean negative log-probability of the masked tokens over the global batch."""
    logprobs, _ = row_logprobs(hidden_TH, weight_VH, batch, parallel)
    # where, not a product: what stands outside the mask must not reach the gradient even if it is infinite.
    total = -torch.where(batch.mask_T > 0, logprobs, 0.0).sum()
    pair = torch.stack((total.detach().double(), batch.mask_T.double().sum()))
    return total / global_tokens, {"loss": pair}


def policy_step_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    batch: MicroBatch,
    *,
    parallel: Parallel,
    objective: Objective,
    update: Update,
    old: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Metrics]:
    """The policy's loss of one micro-batch.

    Args:
        old: where the current log-probabilities, with the entropies, are left if the micro-batch has no old ones: they are these (first update
            on fresh rollouts).
    """
    logprobs, entropy = row_logprobs(hidden_TH, weight_VH, batch, parallel, objective.temperature)
    if batch.old_logprobs_T is None:
        old.append((logprobs.detach(), entropy.detach()))
    inputs = LossInputs(
        logprobs_T=logprobs,
        old_logprobs_T=old[-1][0] if batch.old_logprobs_T is None else batch.old_logprobs_T,
        advantages_T=batch.advantages_T,
        mask_T=batch.mask_T,
        sequence_ids_T=batch.sequence_ids_T,
        ref_logprobs_T=batch.ref_logprobs_T,
        rollout_logprobs_T=batch.rollout_logprobs_T,
        entropy_T=entropy,
        has_image_T=batch.has_image_T,
        # Each id that a micro-batch holds is below this; rows of an empty one count as sequence 0.
        sequences=max(len(batch.pieces), 1),
        global_tokens=update.tokens,
        global_sequences=update.sequences,
    )
    return policy_loss(objective.loss, inputs, compat=objective.compat, **objective.options)


def reduce_over_data(parts: Iterable[Metrics], parallel: Parallel) -> Metrics:
    """Add the metrics of all micro-batches and data-parallel ranks (`_max`: maximum); the keys must agree over ranks."""
    total = {key: value.clone() for key, value in add_metrics(parts).items()}
    if parallel.data.size > 1:
        for key in sorted(total):
            operation = dist.ReduceOp.MAX if key.endswith("_max") else dist.ReduceOp.SUM
            dist.all_reduce(total[key], op=operation, group=parallel.data.group)
    return total
