"""Qwen2.5-VL's sizes and this package's choices as Megatron's `TransformerConfig`, one for the text decoder and one for the vision tower."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.parallel.runtime import Parallel

# Qwen2.5-VL's vision norms carry their epsilon in code, not in config.json.
VISION_NORM_EPS = 1e-6

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # The backward pass runs attention within segments again; everything else is kept.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    # Only the input of every layer is kept.
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


# Megatron's names of our backends.
IMPLEMENTATIONS = {"local": "local", "te": "transformer_engine"}


def fp8_rows(execution: Execution, layout: Layout) -> int:
    """The rows that one rank's matrix products see must be a multiple of this."""
    if execution.fp8 == "none":
        return 1
    # Blocks of 128 rows share a scale, and a block must not be gathered from two ranks.
    return 128 if execution.fp8_recipe == "blockwise" and layout.sequence_parallel else 16


def _common(parallel: Parallel, execution: Execution) -> dict[str, Any]:
    on_cpu = parallel.device.type == "cpu"
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": getattr(torch, execution.dtype),
        "bf16": execution.dtype == "bfloat16",
        # Weights always come from a checkpoint: nothing is drawn.
        "use_cpu_initialization": on_cpu,
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        # Fused kernels are jit-compiled for CUDA. Fused rotary code restarts positions per sequence: wrong for mrope.
        "bias_activation_fusion": not on_cpu,
        "bias_dropout_fusion": not on_cpu,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "calculate_per_token_loss": True,  # the loss carries its own global denominator: gradients are summed, never averaged
        "transformer_impl": IMPLEMENTATIONS[execution.backend],
        **RECOMPUTE[execution.recompute],
    }


def _fp8(config: QwenVLConfig, parallel: Parallel, execution: Execution) -> dict[str, Any]:
    if execution.fp8 == "none":
        return {}
    text, size = config.text_config, parallel.tensor.size
    heads = text.num_attention_heads * text.head_dim
    widths = {
        "hidden_size": text.hidden_size,
        "intermediate_size / parallel.tensor": text.intermediate_size // size,
        "query heads' width / parallel.tensor": heads // size,
        "qkv width / parallel.tensor": (heads + 2 * text.num_key_value_heads * text.head_dim) // size,
    }
    wrong = [f"{name}={width}" for name, width in widths.items() if width % 16]
    if wrong:
        raise ConfigError(f"model.fp8 needs widths that are multiples of 16, found {', '.join(wrong)}")
    # Scales from a longer history than Megatron's default of one step, as in its own FP8 recipes.
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return {
        "fp8": execution.fp8,
        "fp8_recipe": execution.fp8_recipe,
        **(history if execution.fp8_recipe == "delayed" else {}),
    }


def text_transformer_config(config: QwenVLConfig, parallel: Parallel, execution: Execution) -> TransformerConfig:
    text, layout = config.text_config, parallel.layout
    interleaved = layout.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        tensor_model_parallel_size=parallel.tensor.size,
        pipeline_model_parallel_size=parallel.pipeline.size,
        num_layers_in_first_pipeline_stage=layout.layers_first_stage,
        num_layers_in_last_pipeline_stage=layout.layers_last_stage,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        # With the default (batched, not overlapped) Megatron's interleaved schedule computes wrong losses without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context.size,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=getattr(torch, execution.dtype),
        # Rows differ in length. Megatron allows that on dense models only under this dispatcher's name, which is otherwise unused.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_fp8(config, parallel, execution),
        **_common(parallel, execution),
    )


def vision_transformer_config(config: QwenVLConfig, parallel: Parallel, execution: Execution) -> TransformerConfig:
    """The tower stands on the first stage only, and unless `vision_parallel` is "tensor" whole on every tensor-parallel rank."""
    vision = config.vision_config
    return TransformerConfig(
        num_layers=vision.depth,
        tensor_model_parallel_size=parallel.tensor.size if parallel.layout.vision_parallel == "tensor" else 1,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        layernorm_epsilon=VISION_NORM_EPS,
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common(parallel, execution),
    )
