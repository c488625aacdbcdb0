"""Megatron's DDP, optimizer and schedule around the model chunks of one rank."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from eureka_megatron.config import OptimizerSection
from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel
from eureka_megatron.parallel.cpu import cuda_type_names

# Megatron computes the gradient norm only when it may clip; this bound never clips.
NEVER = 1e30


def wrap(chunks: list[QwenVLModel], optimizer: OptimizerSection) -> list[DistributedDataParallel]:
    """DDP with fp32 gradient buffers, which sums over data-parallel ranks (the loss carries the global denominator)."""
    wrapped = []
    for index, chunk in enumerate(chunks):
        config = chunk.config
        module = Float16Module(config, chunk) if config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config=config,
                # Megatron's distributed optimizer shards Adam's state over DP; it knows no SGD, which has no state to shard.
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=optimizer.name == "adam"
                ),
                module=module,
                disable_bucketing=index > 0,
            )
        )
    return wrapped


def make_optimizer(
    chunks: list[DistributedDataParallel], section: OptimizerSection, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam (distributed, fp32 masters) or plain SGD, and the schedule.

    Args:
        total_updates: optimizer steps of the whole run, the schedule's horizon.
    """
    bf16 = chunks[0].config.bf16
    config = OptimizerConfig(
        optimizer=section.name,
        lr=section.lr,
        min_lr=section.lr * section.min_lr_ratio,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        sgd_momentum=0.0,
        clip_grad=section.clip_grad or NEVER,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=section.name == "adam",
    )
    with cuda_type_names():
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    warmup = round(section.warmup_ratio * total_updates)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_updates, warmup + 1),
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def learning_rate(optimizer: Any) -> float:
    """The rate of the parameters with standard settings."""
    return max(group["lr"] for group in optimizer.param_groups)
