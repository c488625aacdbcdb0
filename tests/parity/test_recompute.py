"""Recomputing activations changes no gradient, and less is kept for the backward pass."""

import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Sample
from eureka_megatron.verify import made_up_samples
from tests.helpers.ranks import run_ranks


class Holder:
    """A saved tensor; the weight reference to it tells when autograd lets go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Bytes of distinct storages that autograd keeps, parameters aside; `peak` over the life of the context.

    What torch's own checkpoint keeps while it computes one vision layer again is not seen: it has hooks of its own.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.users: Counter[int] = Counter()
        self.now, self.peak = 0, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: torch.Tensor) -> Holder:
        storage = tensor.untyped_storage()
        holder, place, size = Holder(tensor), storage.data_ptr(), storage.nbytes()
        if place not in self.ignored:
            self.now += size if not self.users[place] else 0
            self.users[place] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self._release, place, size)
        return holder

    def _release(self, place: int, size: int) -> None:
        self.users[place] -= 1
        self.now -= size if not self.users[place] else 0


def gradients(rank: int, directory: str, samples: list[Sample], layout: dict, freeze: tuple) -> dict[str, tuple]:
    """For every kind of recomputation: this rank's gradients, and the bytes kept at the worst moment."""
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(Layout(**layout), rank=rank, world_size=torch.distributed.get_world_size())
    found = {}
    section = OptimizerSection(
        name="sgd"
    )  # Adam's distributed optimizer would reduce only a share of the gradients on each rank
    for recompute in ("none", "selective", "full"):
        trainer = PolicyTrainer(directory, parallel, Execution(recompute=recompute), freeze=freeze, optimizer=section)
        parameters = {
            f"{i}.{name}": p for i, chunk in enumerate(trainer.chunks) for name, p in chunk.named_parameters()
        }
        kept = Kept(list(parameters.values()))
        with kept.hooks:
            trainer.accumulate(samples)
        grads = {name: p.main_grad.clone() for name, p in parameters.items() if p.requires_grad}
        found[recompute] = grads, kept.peak
    return found


@pytest.mark.parametrize(
    ("layout", "freeze"),
    [
        ({}, ()),
        ({}, ("vision",)),
        ({}, ("vision", "merger")),
        ({}, ("merger",)),
        ({}, ("language",)),
        ({}, ("vision", "merger", "model.embed_tokens.weight", "model.layers.0.*")),  # no input that needs a gradient
        ({"tensor": 2, "sequence_parallel": True}, ()),
        ({"pipeline": 2}, ()),
        ({"pipeline": 2}, ("vision", "merger")),
        ({"pipeline": 2, "virtual_pipeline": 2}, ()),
        ({"context": 2}, ()),
    ],
    ids=[
        "one",
        "frozen-vision",
        "frozen-tower",
        "frozen-merger",
        "frozen-language",
        "frozen-embeddings",
        "tp2-sp",
        "pp2",
        "pp2-frozen",
        "pp2-vpp2",
        "cp2",
    ],
)
def test_recomputation_changes_no_gradient_and_keeps_less(tiny_dir: Path, layout: dict, freeze: tuple) -> None:
    world = Layout(**layout).world_size
    samples = made_up_samples(tiny_dir, pictures=[((4, 8),), ((6, 6), (3, 5)), ((4, 6),)])
    for found in run_ranks(gradients, world, str(tiny_dir), samples, layout, freeze):
        plain, _ = found["none"]
        assert plain
        assert all(gradient.any() for gradient in plain.values())
        for recompute in ("selective", "full"):
            for name, gradient in found[recompute][0].items():
                assert torch.equal(gradient, plain[name]), (recompute, name)
        kept = {recompute: peak for recompute, (_, peak) in found.items()}
        print({recompute: f"{peak / 1e6:.1f} MB" for recompute, peak in kept.items()})
        assert kept["full"] < kept["selective"] < kept["none"]
