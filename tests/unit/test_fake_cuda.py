"""A rollout step on a GPU that is not there (tests/helpers/fake_cuda.py): devices are not mixed, and no micro-batch makes the host wait.

Everything of `PolicyTrainer.train` runs but the backward pass and the optimizer: packing, the frozen tower, old log-probabilities, the
forward pass of every update through Megatron's schedule, the losses, their metrics. Weights are not loaded: there are no values.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eureka_megatron.layout import Execution
from eureka_megatron.rl.losses import AGGREGATIONS, CORRECTIONS, LOSSES
from eureka_megatron.rl.shaping import Shaping
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify import made_up_samples
from tests.helpers.fake_cuda import FakeCuda, fake_rank
from tests.helpers.ranks import run_ranks

FROZEN, BLOCKS = {"freeze": ("vision", "merger")}, {"freeze": ("vision",)}
TP2 = {"world_size": 2, "tensor": 2, "rank": 1}
# Arguments of fake_rank; fields of Execution and further arguments of PolicyTrainer.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": ({}, {}),
    "fp32": ({}, {"dtype": "float32"}),
    "frozen tower": ({}, FROZEN),
    "frozen blocks": ({}, BLOCKS),
    "tp2": (TP2, {}),
    "tp2-sp, shared pictures": (TP2 | {"sequence_parallel": True, "vision_parallel": "data"}, {}),
    "tp2-sp, split tower": (TP2 | {"sequence_parallel": True, "vision_parallel": "tensor"}, {}),
    "cp2": ({"world_size": 2, "context": 2, "rank": 1}, {}),
    "cp2, fp32": ({"world_size": 2, "context": 2}, {"dtype": "float32"}),
    "tp2-sp-cp2-dp2, frozen": (
        {"world_size": 8, "tensor": 2, "context": 2, "rank": 5, "sequence_parallel": True},
        FROZEN,
    ),
}
METRICS, FEATURES, SHAPED = (
    "rl/losses.py in reduce_metrics",
    "train/freeze.py in features",
    "rl/shaping.py in _on_host",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer of a model with two layers of each kind: every operation costs milliseconds here."""
    from eureka_megatron.demo.forms import build_published

    sizes = {"text_layers": 2, "vision_depth": 2, "full_attention_blocks": (1,)}
    return build_published(tmp_path_factory.mktemp("shallow") / "hf", weights=False, **sizes)


@pytest.fixture(scope="module")
def samples(model: Path) -> list[Sample]:
    """Two responses to each of three prompts: one picture, two of different sizes, none."""
    prompts = made_up_samples(model, pictures=(((3, 3),), ((2, 5), (1, 1)), ()))
    return [
        replace(sample, advantages_S=sample.mask_S * (number - 1.5), rollout_logprobs_S=sample.mask_S * -6.0)
        for number in range(2)
        for sample in prompts
    ]


def make_trainer(directory: str, parallel: Any, options: dict[str, Any]) -> Any:
    """A trainer on fake weights whose updates are forward passes alone."""
    from eureka_megatron.rl.losses import reduce_metrics
    from eureka_megatron.train import step, trainer

    trainer.load_hf = lambda *_, **__: None
    torch.nn.Module.bfloat16 = already_bf16  # Float16Module's; torch cannot put new tensors into fake parameters
    how = {"dtype": "bfloat16"} | {name: options[name] for name in options.keys() & set(Execution.model_fields)}
    others = {name: options[name] for name in options.keys() - how.keys()}
    policy = trainer.PolicyTrainer(directory, parallel, Execution(**how), **others)
    policy.scheduler = SimpleNamespace()

    def forward_only(micro_batches: list, loss: Any) -> dict[str, float]:
        parts = step.run_schedule(policy.chunks, micro_batches, loss, parallel, forward_only=True)
        return reduce_metrics([step.reduce_over_data(parts, parallel)])

    policy._update = forward_only
    return policy


def already_bf16(module: torch.nn.Module) -> torch.nn.Module:
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    assert not list(module.buffers())
    return module


def rehearse(
    _: int, directory: str, setting: tuple, tokens: int, steps: list[tuple[Batch, dict]]
) -> list[dict[str, Any]]:
    """Rollout steps (batch, arguments of `train`): the waits, forward passes, and the most bytes on the GPU when one of them begins."""
    layout, options = setting
    found = []
    with fake_rank(**{"rank": 0, "world_size": 1} | layout) as (parallel, gpu):
        trainer = make_trainer(directory, parallel, options | {"max_tokens_per_micro_batch": tokens})
        assert not gpu.waits
        before: list[int] = []
        trainer.chunks[0].register_forward_pre_hook(lambda *_: before.append(gpu.allocated_bytes()))
        with torch.no_grad():
            for batch, arguments in steps:
                gpu.waits.clear(), before.clear()
                metrics = trainer.train(batch, **{"loss": "ppo_clip", "options": {}} | arguments)
                assert all({"policy_loss", "entropy", "mult_prob_error_image"} <= one.keys() for one in metrics)
                found.append({"waits": dict(gpu.waits), "forwards": len(before), "bytes": max(before)})
    return found


def by_function(waits: dict[Any, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for wait, count in waits.items():
        found[re.sub(r":\d+", "", wait.where)] += count
    return found


def show(name: str, found: dict[str, Any]) -> None:
    waits = ", ".join(f"{count} {wait.what} ({wait.where})" for wait, count in found["waits"].items())
    print(
        f"{name}: {found['forwards']} forward passes of micro-batches; the host waits {sum(found['waits'].values())} times: {waits}"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_no_micro_batch_makes_the_host_wait(model: Path, samples: list[Sample], name: str) -> None:
    """Once for the metrics of an update, once for those of the step and once for a frozen tower's features: however many micro-batches."""
    updates = (tuple(range(4)), tuple(range(4, 6)))
    longest = max(map(len, samples)) + 8
    forwards = []
    for tokens in (longest, 4 * longest) if name == "one rank" else (longest,):
        steps = [(Batch(tuple(samples), updates), {})]
        [found] = run_ranks(rehearse, 1, str(model), SETTINGS[name], tokens, steps)[0]
        show(f"{name}, rows of {tokens}", found)
        assert by_function(found["waits"]) == {METRICS: 3} | ({FEATURES: 1} if "freeze" in SETTINGS[name][1] else {})
        forwards.append(found["forwards"])
    assert forwards[0] == max(forwards) >= 4  # old log-probabilities of the second update, and both updates


def test_nor_do_samples_without_pictures_and_rows_without_samples(model: Path, samples: list[Sample]) -> None:
    text = samples[2::3]
    steps = [(Batch((*text, text[0]), ((0, 1), (2,))), {"loss": "dapo"})]
    for layout in ({}, {"world_size": 2, "rank": 1}):  # data parallel: rank 1 gets no sample of the second update
        [found] = run_ranks(rehearse, 1, str(model), (layout, FROZEN), 400, steps)[0]
        assert by_function(found["waits"]) == {METRICS: 3}


def test_nor_does_shaping_but_once_a_step(model: Path, samples: list[Sample]) -> None:
    """It works on the host, on old log-probabilities that come from the GPU; those of the reference come with the samples here."""
    given = tuple(replace(sample, ref_logprobs_S=sample.mask_S * -5.0) for sample in samples)
    shaped = {"shaping": Shaping(kl_coefficient=0.1, whitened=True), "compat": "mm_eureka", "passes": 2}
    steps = [(Batch(given, ((0, 1, 2), (3, 4, 5))), shaped)]
    [found] = run_ranks(rehearse, 1, str(model), ({}, {}), 400, steps)[0]
    show("KL in the reward, two passes", found)
    assert by_function(found["waits"]) == {METRICS: 5, SHAPED: 1}


def loss_waits(_: int) -> dict[str, list[Any]]:
    """Every loss with every aggregation and correction, with all that the record can hold."""
    from eureka_megatron.rl.losses import LossInputs, policy_loss

    tokens = 24
    found: dict[str, list[Any]] = {}
    with FakeCuda() as gpu:
        floats = {
            field: torch.empty(tokens, device="cuda")
            for field in ("logprobs_T", "old_logprobs_T", "advantages_T", "mask_T")
        }
        floats |= {
            field: torch.empty(tokens, device="cuda") for field in ("ref_logprobs_T", "rollout_logprobs_T", "entropy_T")
        }
        ids = torch.empty(tokens, dtype=torch.int64, device="cuda")
        inputs = LossInputs(
            **floats, sequence_ids_T=ids, has_image_T=ids > 1, sequences=3, global_tokens=9.0, global_sequences=3.0
        )
        choices = {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "sequence_norm_tokens": 64.0, "dual_clip": 3.0}
        for name, kind, correction in product(LOSSES, AGGREGATIONS, CORRECTIONS):
            for compat in (None, "mm_eureka") if name in ("ppo_clip", "dapo", "cpgd") else (None,):
                gpu.waits.clear()
                chosen = choices | {"aggregation": kind, "correction": correction}
                loss, metrics = policy_loss(name, inputs, compat=compat, **chosen)
                assert {value.device.type for value in (loss, *metrics.values())} == {"cuda"}
                found[f"{name} {kind} {correction} {compat}"] = list(gpu.waits.elements())
    return found


def test_nor_does_any_loss() -> None:
    [found] = run_ranks(loss_waits, 1)
    assert len(found) == 96
    assert {name: waits for name, waits in found.items() if waits} == {}


def numbered(sample: Sample, number: int) -> Sample:
    """With pictures of its own."""
    return replace(sample, pictures=tuple(replace(p, key=f"{number} {p.key}") for p in sample.pictures))


@pytest.mark.parametrize("freeze", [{}, BLOCKS, FROZEN], ids=["learning", "frozen blocks", "frozen tower"])
def test_pictures_stand_on_the_gpu_one_micro_batch_at_a_time(
    model: Path, samples: list[Sample], freeze: dict[str, Any]
) -> None:
    """What is there when a forward pass begins does not grow with the micro-batches, but for a few numbers a token."""
    sample, counts = samples[0], (2, 8)
    steps = [
        (Batch(tuple(numbered(sample, number) for number in range(count)), (tuple(range(count)),)), {})
        for count in counts
    ]
    found = run_ranks(rehearse, 1, str(model), ({}, freeze), len(sample), steps)[0]
    assert [one["forwards"] for one in found] == [*counts], "no pass for old log-probabilities: there is one update"
    growth = (found[1]["bytes"] - found[0]["bytes"]) / (counts[1] - counts[0])
    smallest = sample.pictures[0].units * 128 * 2  # a picture's embeddings; its features and patches are larger
    print(f"{growth:.0f} bytes more for each further micro-batch of {len(sample)} tokens; a picture has {smallest}")
    assert 0 < growth <= 16 * len(sample) < smallest  # measured 436 for 59 tokens: two fp32 numbers each


def backward_waits(_: int) -> list[Any]:
    """Autograd's engine does not run here, so the head's own forward and backward are called by hand."""
    from eureka_megatron.rl.logprobs import _TokenLogprobs

    with fake_rank(0, 1) as (parallel, gpu), torch.no_grad():
        hidden, weight = (torch.empty(rows, 16, dtype=torch.bfloat16, device="cuda") for rows in (40, 100))
        labels = torch.zeros(40, dtype=torch.int64, device="cuda")
        context = SimpleNamespace(needs_input_grad=(True, True), set_materialize_grads=lambda _: None)
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        results = _TokenLogprobs.forward(context, hidden, weight, labels, parallel.tensor.group, 0.7, 40 * 30)
        gradients = _TokenLogprobs.backward(context, *map(torch.ones_like, results))[:2]
        return [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in (*results, *gradients)], dict(gpu.waits)


def test_nor_does_the_backward_pass_of_the_head() -> None:
    [(found, waits)] = run_ranks(backward_waits, 1)
    wide, narrow = torch.float32, torch.bfloat16
    shapes = [((40,), wide), ((40,), wide), ((40, 16), narrow), ((100, 16), narrow)]
    assert found == [(*one, "cuda") for one in shapes]
    assert not waits


# What the fake GPU must notice: code, and the kind of wait.
NOTICED: dict[str, tuple[Callable[[torch.Tensor], object], str | None]] = {
    "item": (lambda x: x.sum().item(), "item"),
    "bool": (lambda x: bool(x.sum() > 0), "item"),
    "int": (lambda x: int(x.max()), "item"),
    "branch": (lambda x: 1 if x.sum() else 0, "item"),
    "list": (lambda x: x.tolist(), "to the host"),
    "cpu": (lambda x: x.cpu(), "to the host"),
    "copy to the host": (lambda x: torch.empty(3).copy_(x), "to the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "isin": (lambda x: torch.isin(x, x), "isin"),
    "mask": (lambda x: x[x > 0], "mask as index"),
    "assigned mask": (lambda x: x.__setitem__(x > 0, x), "mask as index"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "index on the host": (lambda x: x[torch.tensor([0])], "from pageable memory"),
    "pageable": (lambda x: torch.ones(3).to(x.device, non_blocking=True), "from pageable memory"),
    "list to the device": (lambda x: torch.tensor([1, 2], device="cuda"), "from pageable memory"),
    "new_tensor": (lambda x: x.new_tensor(0.5), "from pageable memory"),
    "blocking": (lambda x: torch.ones(3).pin_memory().to("cuda"), "from pageable memory"),
    "pinned": (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), None),
    "joined in pinned memory": (
        lambda x: torch.cat([torch.ones(3)], out=torch.empty(3, pin_memory=True)).to("cuda", non_blocking=True),
        None,
    ),
    "mask and number": (lambda x: x.__setitem__(x > 0, 0.0), None),
    "where": (lambda x: torch.where(x > 0, x, 0.0), None),
    "made there": (lambda x: torch.zeros(3, device="cuda"), None),
}


def noticed(_: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with FakeCuda() as gpu:
        x = torch.ones(3, device="cuda")
        for name, (code, _) in NOTICED.items():
            gpu.waits.clear()
            code(x)
            found[name] = [wait.what for wait in gpu.waits.elements()]
        try:
            x + torch.ones(3)
        except RuntimeError as error:
            found["mixed"] = str(error)
        held = gpu.allocated_bytes()
        y = x[1:].expand(5, 2) + 0.0
        found["bytes"] = [gpu.allocated_bytes() - held]
        del y
        found["bytes"].append(gpu.allocated_bytes() - held)
        found["real"] = (torch.tensor(np.arange(3)) * 2).tolist()
    return found


def test_the_fake_gpu_notices_what_it_should() -> None:
    [found] = run_ranks(noticed, 1)
    assert "same device" in found.pop("mixed")
    assert found.pop("bytes") == [40, 0]
    assert found.pop("real") == [0, 2, 4]
    assert found == {name: [kind] if kind else [] for name, (_, kind) in NOTICED.items()}
