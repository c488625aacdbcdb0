"""THE TABLE: which HF tensors become which Megatron parameter of Qwen2.5-VL, and by which split.

Loading, offline conversion, HF export and online weight sync all read it; nothing else spells a weight's name.
HF names are the hub's (`visual.*`, `model.layers.*`); `hub_name` turns the newer naming, and vLLM's, into it.

Legend of shapes: V vocabulary, H text hidden, F text ffn, D vision hidden, G vision ffn, M merger hidden,
O merger output.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING

from eureka_megatron.errors import ConfigError
from eureka_megatron.weights.splits import (
    ByColumns,
    ByRows,
    FusedQKV,
    GatedUp,
    Replicated,
    Shape,
    Split,
    VisionQKV,
)

if TYPE_CHECKING:
    from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, TextConfig, VisionConfig

# Names of the norms before attention and before the MLP. Transformer Engine fuses them into the linear that follows.
NORMS = {
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
}
# Hub checkpoints, newer transformers and vLLM name the same tensors differently.
_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


@dataclass(frozen=True)
class Stack:
    """Layers that repeat: `{i}` in the names of a row runs over 0 … layers-1."""

    name: str
    layers: int


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of.

    Example: Row("decoder.layers.{i}.mlp.linear_fc1.weight",
                 {"model.layers.{i}.mlp.gate_proj.weight": (F, H), "model.layers.{i}.mlp.up_proj.weight": (F, H)},
                 GatedUp(), Stack("text", 28)).
    """

    megatron: str
    hf: Mapping[str, Shape]  # name → shape, in the order the split counts its sources
    split: Split
    stack: Stack | None = None
    copy: bool = False  # a further copy of tensors that another row owns: loaded where it exists, never exported

    @property
    def shapes(self) -> list[Shape]:
        return list(self.hf.values())

    def at(self, i: int) -> Row:
        """This row for layer i, without pattern."""
        name = str(i)
        hf = {pattern.replace("{i}", name): shape for pattern, shape in self.hf.items()}
        return replace(self, megatron=self.megatron.replace("{i}", name), hf=hf, stack=None)


def rows(hf_config: QwenVLConfig, *, backend: str = "local", vision_parallel: str = "replicated") -> tuple[Row, ...]:
    """The table, in the order of iteration. A transformers configuration object serves as well: same field names.

    `backend`: "local" or "te". `vision_parallel`: "replicated" and "data" keep the vision tower whole on every
    tensor-parallel rank, "tensor" cuts it like the text.
    """
    if backend not in NORMS:
        raise ConfigError(f"unknown model backend {backend!r}; valid: {', '.join(NORMS)}")
    if vision_parallel not in ("replicated", "data", "tensor"):
        raise ConfigError(f"unknown vision_parallel {vision_parallel!r}; valid: replicated, data, tensor")
    norms = NORMS[backend]
    vision = _vision(hf_config.vision_config, norms, whole=vision_parallel != "tensor")
    return (*vision, *_text(hf_config.text_config, norms, tied=hf_config.tie_word_embeddings))


def _text(config: TextConfig, norms: tuple[str, str], *, tied: bool) -> tuple[Row, ...]:
    V, H, F = config.vocab_size, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = H // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    qkv = FusedQKV(heads, kv_heads, head_dim)
    stack = Stack("text", config.num_hidden_layers)
    mcore, hf = "decoder.layers.{i}.", "model.layers.{i}."
    embedding = {"model.embed_tokens.weight": (V, H)}
    head = {"lm_head.weight": (V, H)}
    # fmt: off
    return (
        Row("embedding.word_embeddings.weight", embedding, ByRows()),
        Row(mcore + norms[0], {hf + "input_layernorm.weight": (H,)}, Replicated(), stack),
        Row(mcore + "self_attention.linear_qkv.weight",
            {hf + "self_attn.q_proj.weight": (q, H),
             hf + "self_attn.k_proj.weight": (kv, H),
             hf + "self_attn.v_proj.weight": (kv, H)}, qkv, stack),
        Row(mcore + "self_attention.linear_qkv.bias",
            {hf + "self_attn.q_proj.bias": (q,),
             hf + "self_attn.k_proj.bias": (kv,),
             hf + "self_attn.v_proj.bias": (kv,)}, qkv, stack),
        Row(mcore + "self_attention.linear_proj.weight", {hf + "self_attn.o_proj.weight": (H, q)}, ByColumns(), stack),
        Row(mcore + norms[1], {hf + "post_attention_layernorm.weight": (H,)}, Replicated(), stack),
        Row(mcore + "mlp.linear_fc1.weight",
            {hf + "mlp.gate_proj.weight": (F, H),
             hf + "mlp.up_proj.weight": (F, H)}, GatedUp(), stack),
        Row(mcore + "mlp.linear_fc2.weight", {hf + "mlp.down_proj.weight": (H, F)}, ByColumns(), stack),
        Row("decoder.final_layernorm.weight", {"model.norm.weight": (H,)}, Replicated()),
        # Tied: the same values stand once more on the last stage when that is not the first; Megatron keeps them equal.
        Row("output_layer.weight", embedding if tied else head, ByRows(), copy=tied),
    )
    # fmt: on


def _vision(config: VisionConfig, norms: tuple[str, str], *, whole: bool) -> tuple[Row, ...]:
    D, G, side = config.hidden_size, config.intermediate_size, config.patch_size
    M, O = D * config.spatial_merge_size**2, config.out_hidden_size  # noqa: E741
    patch = (D, config.in_channels, config.temporal_patch_size, side, side)
    stack = Stack("vision", config.depth)
    mcore, hf = "vision.decoder.layers.{i}.", "visual.blocks.{i}."

    def on_ranks(split: Split) -> Split:
        return Replicated(split) if whole else split

    qkv, gated, cut_rows, cut_columns = map(on_ranks, (VisionQKV(config.num_heads), GatedUp(), ByRows(), ByColumns()))
    # fmt: off
    return (
        Row("vision.patch_embed.weight", {"visual.patch_embed.proj.weight": patch}, Replicated()),
        Row(mcore + norms[0], {hf + "norm1.weight": (D,)}, Replicated(), stack),
        Row(mcore + "self_attention.linear_qkv.weight", {hf + "attn.qkv.weight": (3 * D, D)}, qkv, stack),
        Row(mcore + "self_attention.linear_qkv.bias", {hf + "attn.qkv.bias": (3 * D,)}, qkv, stack),
        Row(mcore + "self_attention.linear_proj.weight", {hf + "attn.proj.weight": (D, D)}, cut_columns, stack),
        Row(mcore + "self_attention.linear_proj.bias", {hf + "attn.proj.bias": (D,)}, Replicated(), stack),
        Row(mcore + norms[1], {hf + "norm2.weight": (D,)}, Replicated(), stack),
        Row(mcore + "mlp.linear_fc1.weight",
            {hf + "mlp.gate_proj.weight": (G, D),
             hf + "mlp.up_proj.weight": (G, D)}, gated, stack),
        Row(mcore + "mlp.linear_fc1.bias",
            {hf + "mlp.gate_proj.bias": (G,),
             hf + "mlp.up_proj.bias": (G,)}, gated, stack),
        Row(mcore + "mlp.linear_fc2.weight", {hf + "mlp.down_proj.weight": (D, G)}, cut_columns, stack),
        Row(mcore + "mlp.linear_fc2.bias", {hf + "mlp.down_proj.bias": (D,)}, Replicated(), stack),
        Row("vision.merger.norm.weight", {"visual.merger.ln_q.weight": (D,)}, Replicated()),
        Row("vision.merger.linear_fc1.weight", {"visual.merger.mlp.0.weight": (M, M)}, cut_rows),
        Row("vision.merger.linear_fc1.bias", {"visual.merger.mlp.0.bias": (M,)}, cut_rows),
        Row("vision.merger.linear_fc2.weight", {"visual.merger.mlp.2.weight": (O, M)}, cut_columns),
        Row("vision.merger.linear_fc2.bias", {"visual.merger.mlp.2.bias": (O,)}, Replicated()),
    )
    # fmt: on


def expand(table: Iterable[Row]) -> tuple[Row, ...]:
    """Rows without patterns, layer by layer: all rows of layer 0, then all of layer 1, …"""
    expanded: list[Row] = []
    for stack, group in groupby(table, key=lambda row: row.stack):
        block = list(group)
        expanded += [row.at(i) for i in range(stack.layers) for row in block] if stack else block
    return tuple(expanded)


# Names for the parts of the model, as patterns of HF names.
PARTS = {
    "vision": ("visual.patch_embed.*", "visual.blocks.*"),
    "merger": ("visual.merger.*",),
    "language": ("model.*", "lm_head.*"),
}


def frozen_rows(table: Iterable[Row], freeze: Iterable[str]) -> frozenset[str]:
    """Megatron names of the parameters that `freeze` keeps from learning.

    Args:
        table: rows without patterns (`expand`).
        freeze: names of `PARTS`, or shell patterns of HF names in the hub's naming, such as "visual.blocks.0.*".

    Raises:
        ConfigError: a pattern matches nothing, or only a part of what is one parameter (q without k and v), or nothing is left to learn.
    """
    table = list(table)
    patterns = {name: PARTS.get(name, (name,)) for name in freeze}
    names = [hf for row in table for hf in row.hf]
    for name, own in patterns.items():
        if not _matching(names, own):
            close = get_close_matches(name, [*PARTS, *names], n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"model.freeze: {name!r} matches no tensor{hint}; parts are {', '.join(PARTS)}, other entries are patterns of "
                "tensor names such as 'visual.blocks.0.*'"
            )
    together = tuple(pattern for own in patterns.values() for pattern in own)
    frozen = set()
    for row in table:
        hit = _matching(row.hf, together)
        if hit and len(hit) < len(row.hf):
            rest = ", ".join(name for name in row.hf if name not in hit)
            raise ConfigError(
                f"model.freeze names {', '.join(hit)} without {rest}: they are one parameter, {row.megatron}"
            )
        if hit:
            frozen.add(row.megatron)
    if len(frozen) == len(table):
        raise ConfigError("model.freeze leaves no parameter to learn")
    return frozenset(frozen)


def unsent(table: Iterable[Row], frozen: frozenset[str]) -> frozenset[str]:
    """Of the frozen parameters those that need not travel to rollout engines: all of their module's are frozen.

    vLLM reloads a module when all its tensors have come; half a module would wait for the rest.
    """
    moving = {_module(row.megatron) for row in table if row.megatron not in frozen}
    return frozenset(name for name in frozen if _module(name) not in moving)


def _module(megatron: str) -> str:
    return megatron.rpartition(".")[0]


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def hf_metadata(hf_config: QwenVLConfig) -> list[tuple[str, Shape]]:
    """(HF name, shape) of every tensor of a checkpoint, in the order in which weights are iterated; needs no model."""
    return tensors_of(expand(rows(hf_config)))


def tensors_of(table: Iterable[Row], skip: Container[str] = ()) -> list[tuple[str, Shape]]:
    """(HF name, shape) in the order in which weights are iterated; `skip` holds Megatron names that are left out."""
    return [item for row in table if not row.copy and row.megatron not in skip for item in row.hf.items()]


def hub_name(name: str) -> str:
    """The name hub checkpoints use (`visual.*`, `model.layers.*`, `lm_head.*`), from any of the three namings."""
    for prefix, hub in _PREFIXES:
        if name.startswith(prefix):
            return hub + name.removeprefix(prefix)
    return name
