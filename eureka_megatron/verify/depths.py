"""What leaves every module along the depth of both models, so that a mismatch shows where it begins.

Depths carry the names of transformers' modules in hub naming, in the order in which data pass them:

    visual.patch_embed, visual.blocks.N, visual.merger          per merge unit, in reading order: [U, patches of a unit, …]
    model.embed_tokens                                           with the pictures placed: [S, H]
    model.layers.N, model.norm                                   [S, H]

and, where asked for, what each attention adds: visual.blocks.N.attn, model.layers.N.self_attn. Beside the rounding of the sum it is added to,
an error of attention can be too small to see.

Each model has its hooks; both sides are brought to these shapes, one tensor a sample, before they are compared. Native activations come in
packed rows, in window order, split over tensor-, sequence- and context-parallel ranks and pipeline stages; every rank undoes that for the
modules it has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.parallel.collectives import gather_rows, gather_units
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.train import packing
from eureka_megatron.types import MicroBatch, Sample
from eureka_megatron.weights.online import unwrap


def depth_names(config: QwenVLConfig, *, attention: bool = False) -> list[str]:
    """All depths, in order."""

    def many(kind: str, own: str, count: int) -> list[str]:
        suffixes = (own, "") if attention else ("",)
        return [f"{kind}.{number}{suffix}" for number in range(count) for suffix in suffixes]

    blocks = many("visual.blocks", ".attn", config.vision_config.depth)
    layers = many("model.layers", ".self_attn", config.text_config.num_hidden_layers)
    return ["visual.patch_embed", *blocks, "visual.merger", "model.embed_tokens", *layers, "model.norm"]


# ---- transformers ----------------------------------------------------------------------------------------------------


@contextmanager
def watch_reference(model: Any) -> Iterator[dict[str, Tensor]]:
    """While active, a forward of transformers' model on one sample fills the dictionary: {depth: tensor} as it left the module.

    The tower runs twice where a sample shows pictures and videos; its tensors stand end to end.
    """
    seen: dict[str, Tensor] = {}
    text, visual = model.model.language_model, model.model.visual
    modules = {"visual.patch_embed": visual.patch_embed, "visual.merger": visual.merger, "model.norm": text.norm}
    for kind, layers, own in (("visual.blocks", visual.blocks, "attn"), ("model.layers", text.layers, "self_attn")):
        for number, layer in enumerate(layers):
            modules |= {f"{kind}.{number}": layer, f"{kind}.{number}.{own}": getattr(layer, own)}

    def keep(name: str, output: Tensor) -> None:
        seen[name] = torch.cat([seen[name], output.detach()]) if name in seen else output.detach()

    with ExitStack() as stack:
        for name, module in modules.items():
            _hook(stack, module, partial(keep, name))
        _hook_input(stack, text.layers[0], partial(keep, "model.embed_tokens"))
        yield seen


def reference_depths(seen: Mapping[str, Tensor], sample: Sample) -> dict[str, Tensor]:
    """What `watch_reference` saw of one sample, in the shapes of this module."""
    found = {name: value[0] for name, value in seen.items() if not name.startswith("visual.")}
    pictures = sample.pictures
    if not pictures:
        return found
    # transformers encodes all pictures, then all videos; here they stand in the order of their placeholders.
    order = sorted(range(len(pictures)), key=lambda index: pictures[index].is_video)
    for name in seen.keys() - found.keys():
        units = seen[name].unflatten(0, (sum(picture.units for picture in pictures), -1))
        parts = dict(zip(order, units.split([pictures[index].units for index in order]), strict=True))
        if name != "visual.patch_embed":  # behind it patches stand in window order
            parts = {index: part[np.argsort(pictures[index].unit_order_U)] for index, part in parts.items()}
        found[name] = torch.cat([parts[index] for index in range(len(pictures))])
    return found


# ---- native ----------------------------------------------------------------------------------------------------------


@dataclass
class _Recorded:
    """Of one pipeline chunk: how many values its modules have a row or a merge unit, and each forward's batch and outputs."""

    widths: dict[str, int] = field(default_factory=dict)
    forwards: list[tuple[MicroBatch, dict[str, Tensor]]] = field(default_factory=list)

    def keep(self, name: str, output: Tensor) -> None:
        self.forwards[-1][1][name] = output.detach()


class NativeDepths:
    """Hooks on the chunks of this rank for as long as it is entered; forwards meanwhile are recorded.

    Args:
        chunks: the rank's pipeline chunks (models.qwen2_5_vl.model.QwenVLModel), wrapped or not.
        attention: record what each attention adds, too.
    """

    def __init__(self, chunks: Sequence[Any], parallel: Parallel, *, attention: bool = False) -> None:
        self.chunks, self.parallel = [unwrap(chunk) for chunk in chunks], parallel
        self._attention = attention
        self._stack = ExitStack()
        self._recorded: list[_Recorded] = []

    def __enter__(self) -> "NativeDepths":
        self._recorded = [self._watch(chunk) for chunk in self.chunks]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, chunk: Any) -> _Recorded:
        recorded = _Recorded()
        _hook_input(self._stack, chunk, lambda batch: recorded.forwards.append((batch, {})))
        if chunk.pre_process:
            recorded.widths["model.embed_tokens"] = chunk.hf_config.text_config.hidden_size
            _hook_input(self._stack, chunk.decoder, partial(recorded.keep, "model.embed_tokens"))
        for name, module, width in _modules(chunk):
            recorded.widths[name] = width
            _hook(self._stack, module, partial(recorded.keep, name))
            if self._attention and (attention := getattr(module, "self_attention", None)) is not None:
                own = f"{name}.{'attn' if name.startswith('visual.') else 'self_attn'}"
                recorded.widths[own] = width
                _hook(self._stack, attention, partial(recorded.keep, own), with_bias=True)
        return recorded

    def whole(self) -> Iterator[tuple[str, int, Tensor]]:
        """(depth, sample, tensor) of this rank's modules; collective over the tensor- and context-parallel ranks of a stage."""
        for recorded in self._recorded:
            for batch, values in recorded.forwards:
                for name, width in recorded.widths.items():
                    if name.startswith("visual."):
                        pieces = self._units(values.get(name), width, batch)
                    else:
                        pieces = packing.split(self._rows(values[name], batch), batch)
                    for index, piece in zip(batch.sample_indices, pieces, strict=True):
                        if len(piece):
                            yield name, index, piece

    def _rows(self, value: Tensor, batch: MicroBatch) -> Tensor:
        """[T, H] of the whole packed row."""
        value = value[:, 0]
        if self.parallel.layout.sequence_parallel:
            value = gather_units(value, [len(value)] * self.parallel.tensor.size, self.parallel.tensor)
        return value if batch.context is None else gather_rows(value, batch.context.order_T, self.parallel.context)

    def _units(self, value: Tensor | None, width: int, batch: MicroBatch) -> list[Tensor]:
        """[U, patches of a unit, …] for each sample: its pictures' units in reading order, the order of their placeholders."""
        vision = batch.vision
        if vision is None:
            return [torch.zeros(0)] * len(batch.sample_indices)
        # A rank that has no picture did not run the tower; it still enters the gathering.
        own = torch.zeros(0, width, device=self.parallel.device) if value is None else value.reshape(-1, width)
        units = own if vision.units_R is None else gather_units(own, vision.units_R, self.parallel.tensor)
        unit_of_row = torch.full((batch.tokens,), -1, device=units.device)
        unit_of_row[vision.placement_E] = vision.source_E
        return [units[places[places >= 0]] for places in packing.split(unit_of_row, batch)]


def _modules(chunk: Any) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """(depth, module, values a row or a merge unit) of what the chunk has."""
    text, vision = chunk.hf_config.text_config, chunk.hf_config.vision_config
    if chunk.pre_process:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        yield "visual.patch_embed", chunk.vision.patch_embed, merged
        for number, layer in enumerate(chunk.vision.decoder.layers):
            yield f"visual.blocks.{number}", layer, merged
        yield "visual.merger", chunk.vision.merger, vision.out_hidden_size
    for layer in chunk.decoder.layers:  # Megatron counts them over all stages, from 1
        yield f"model.layers.{layer.layer_number - 1}", layer, text.hidden_size
    if chunk.post_process:
        yield "model.norm", chunk.decoder.final_layernorm, text.hidden_size


def _hook(
    stack: ExitStack, module: torch.nn.Module, keep: Callable[[Tensor], None], *, with_bias: bool = False
) -> None:
    """Layers return their output alone or first of a tuple; Megatron's attention with a bias, or None, that is yet to be added to it."""

    def hook(_: Any, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if with_bias:  # a copy in any case: without a gradient the residual is added in place
            first = first.clone() if output[1] is None else first.float() + output[1].float()
        keep(first)

    stack.callback(module.register_forward_hook(hook).remove)


def _hook_input(stack: ExitStack, module: torch.nn.Module, keep: Callable[[Any], None]) -> None:
    def hook(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        keep(args[0] if args else options["hidden_states"])

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


# ---- comparison ------------------------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """max |a − b| / max |scale|, which is b unless given; NaN counts as infinite."""
    largest = (b if scale is None else scale).abs().max().clamp(min=1e-30)
    error = ((a - b).abs().max() / largest).item()
    return error if error == error else float("inf")


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; NaN counts as infinite."""
    error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def depth_errors(
    native: NativeDepths,
    reference: Mapping[str, Tensor],
    names: Sequence[str],
    measure: Callable[[Tensor, Tensor], float] = relative,
) -> dict[str, float]:
    """{depth: largest difference over the samples}, in order, on every rank; infinite where a module was never seen.

    Args:
        reference: "depth.<sample>.<depth>", see `reference_depths`.
    """
    own: dict[str, float] = {}
    for name, index, value in native.whole():
        expected = reference[f"depth.{index}.{name}"]
        own[name] = max(own.get(name, 0.0), measure(value.float().cpu().view_as(expected), expected))
    parts: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: max([part[name] for part in parts if name in part], default=float("inf")) for name in names}
