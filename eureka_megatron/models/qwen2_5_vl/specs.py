"""Megatron layer specifications for both towers and both backends.

`local` is torch only and runs on CPU and GPU; `te` is Transformer Engine, for GPUs. They differ in four classes of a layer; the names of
their parameters differ in the norms alone (`weights.table.NORMS`).
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Execution
from eureka_megatron.models.qwen2_5_vl.attention import RMSNorm, SegmentAttention
from eureka_megatron.parallel.runtime import Parallel


def layer_spec(mask: AttnMaskType, backend: str = "local") -> ModuleSpec:
    """One pre-norm layer: RMSNorm, fused-QKV self-attention, RMSNorm, gated MLP."""
    norm, column, row, attention = _parts(backend)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=attention,
                    linear_proj=row,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _parts(backend: str) -> tuple[Any, Any, Any, Any]:
    """Norm, column-parallel linear behind it, row-parallel linear, core attention."""
    if backend == "te":
        from eureka_megatron.models.qwen2_5_vl import te  # imports Transformer Engine

        return te.PARTS
    return RMSNorm, ColumnParallelLinear, RowParallelLinear, SegmentAttention


def check_backend(execution: Execution, parallel: Parallel) -> None:
    """Refuse Transformer Engine where it cannot run. Raises ConfigError."""
    if execution.backend == "local":
        return
    try:
        import transformer_engine.pytorch  # noqa: F401
    # A package that does not fit this torch, CUDA or machine fails in any of these ways.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.backend='te' needs Transformer Engine, which cannot be imported ({reason}); "
            "make install-te builds it, or set model.backend to 'local'"
        ) from error
    if parallel.device.type != "cuda":
        raise ConfigError("model.backend='te' needs a GPU; set model.backend to 'local'")
