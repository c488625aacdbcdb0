"""Chunked log-probabilities against the naive formula, forward and backward, whole and split over the vocabulary."""

from pathlib import Path

import pytest
import torch

from eureka_megatron.rl.logprobs import token_logprobs
from tests.helpers.ranks import run_ranks


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (hidden @ weight.T).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), torch.randn(48, 16, generator=generator)
    labels = torch.randint(0, 48, (37,), generator=generator)
    upstream = torch.randn(2, 37, generator=generator)
    return hidden, weight, labels, upstream


def gradients(
    function: object, hidden: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = function(hidden, weight)
    (logprobs * upstream[0] + entropies * upstream[1]).sum().backward()
    return [logprobs.detach(), entropies.detach(), hidden.grad, weight.grad]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("at_once", [1, 37 * 5, 37 * 48, 1 << 20])
def test_equals_the_naive_formula_for_every_block_size(at_once: int) -> None:
    hidden, weight, labels, upstream = data()
    found = gradients(lambda h, w: token_logprobs(h, w, labels, logits_at_once=at_once), hidden, weight, upstream)
    expected = gradients(lambda h, w: naive(h, w, labels), hidden, weight, upstream)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-6  # measured 4e-7


@pytest.mark.parametrize("temperature", [0.5, 0.7, 2.0])
def test_a_temperature_divides_the_logits(temperature: float) -> None:
    hidden, weight, labels, upstream = data()
    found = gradients(
        lambda h, w: token_logprobs(h, w, labels, temperature=temperature, logits_at_once=37 * 5),
        hidden,
        weight,
        upstream,
    )
    expected = gradients(lambda h, w: naive(h, w / temperature, labels), hidden, weight, upstream)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-6  # measured 5e-7


def split_body(rank: int, size: int) -> list[torch.Tensor]:
    hidden, weight, labels, upstream = data()
    part = weight.chunk(size)[rank]
    group = torch.distributed.group.WORLD
    found = gradients(
        lambda h, w: token_logprobs(h, w, labels, group=group, logits_at_once=37 * 5), hidden, part, upstream
    )
    torch.distributed.all_reduce(found[2])  # the caller's tensor-parallel region does this
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_split_over_ranks_gives_the_same(size: int) -> None:
    hidden, weight, labels, upstream = data()
    expected = gradients(lambda h, w: naive(h, w, labels), hidden, weight, upstream)
    ranks = run_ranks(split_body, size, size)
    for found in ranks:
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert relative(a, b) <= 1e-6  # measured 5e-7
    assert relative(torch.cat([found[3] for found in ranks]), expected[3]) <= 1e-6  # measured 4e-7


@pytest.mark.parametrize("upstream_of", [0, 1])
def test_either_result_may_be_used_alone(upstream_of: int) -> None:
    hidden, weight, labels, upstream = data()
    upstream = upstream * torch.tensor([[1.0], [0.0]]).roll(upstream_of, 0)
    expected = gradients(lambda h, w: naive(h, w, labels), hidden, weight, upstream)
    hidden.requires_grad_(), weight.requires_grad_()
    (token_logprobs(hidden, weight, labels)[upstream_of] * upstream[upstream_of]).sum().backward()
    assert relative(hidden.grad, expected[2]) <= 1e-6  # measured 4e-7
    assert relative(weight.grad, expected[3]) <= 1e-6  # measured 4e-7


def test_a_frozen_head_or_body_gets_no_gradient() -> None:
    hidden, weight, labels, upstream = data()
    expected = gradients(lambda h, w: (naive(h, w, labels)[0], torch.zeros(37)), hidden, weight, upstream)
    for place, value in enumerate(expected[2:]):
        inputs = [hidden.clone(), weight.clone()]
        inputs[place].requires_grad_()
        (token_logprobs(*inputs, labels)[0] * upstream[0]).sum().backward()
        assert relative(inputs[place].grad, value) <= 1e-6  # measured 4e-7
        assert inputs[1 - place].grad is None


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 4), 100.0), torch.eye(8, 4) * 100
    logprobs, entropies = token_logprobs(hidden, weight, torch.tensor([0, 7]))
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropies).all()


def extra_bytes(rank: int, tokens: int, words: int, at_once: int) -> int:
    """What forward and backward hold at most beyond inputs, in a process that does nothing else."""
    hidden = torch.randn(tokens, 16).requires_grad_()
    weight = torch.randn(words, 16).requires_grad_()
    labels = torch.randint(words, (tokens,))
    token_logprobs(hidden[:8], weight[:8], labels[:8] % 8)[
        0
    ].sum().backward()  # libraries load and allocate what they keep
    held = peak_bytes(restart=True)
    logprobs, entropies = token_logprobs(hidden, weight, labels, logits_at_once=at_once)
    (logprobs + entropies).sum().backward()
    return peak_bytes() - held


def peak_bytes(restart: bool = False) -> int:
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_memory_is_that_of_the_logits_held_at_once() -> None:
    tokens, words = 2048, 16384
    extra = run_ranks(extra_bytes, 1, tokens, words, 1 << 20)[0]
    assert extra <= tokens * words * 4 * 3 / 10  # a tenth of the naive way's three copies, 40 MB; measured 18 MB


def wide() -> tuple[torch.Tensor, ...]:
    """bf16 operands with logits of up to 40, as a trained model has them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=generator).bfloat16()
    weight = (torch.randn(1000, 256, generator=generator) * 0.6).bfloat16()
    labels = (hidden @ weight.T).topk(3).indices[:, 2]  # likely words, but not the likeliest
    return hidden, weight, labels, torch.randn(2, 64, generator=generator)


def test_logits_of_bf16_operands_are_not_rounded_to_bf16() -> None:
    """Against fp64 logits of the same operands. Between 16 and 32 neighbours in bf16 are 0.125 apart."""
    hidden, weight, labels, upstream = wide()
    found = gradients(lambda h, w: token_logprobs(h, w, labels, logits_at_once=64 * 300), hidden, weight, upstream)
    exact = gradients(lambda h, w: naive(h, w, labels), hidden.double(), weight.double(), upstream)
    errors = [(a - b).abs().max().item() for a, b in zip(found[:2], exact[:2], strict=True)]
    errors += [relative(a.double(), b) for a, b in zip(found[2:], exact[2:], strict=True)]
    print([f"{error:.1e}" for error in errors])
    assert torch.einsum("th,vh->tv", hidden.double(), weight.double()).abs().max() > 32
    assert max(errors[:2]) <= 5e-5  # measured 1.3e-5; with logits rounded to bf16 1.3e-1
    assert max(errors[2:]) <= 5e-3  # measured 3.6e-3; the exact gradients, rounded to bf16 as they must be: 2.5e-3


def test_the_size_of_the_blocks_does_not_show_in_bf16() -> None:
    """What is summed over blocks of words is summed in fp32."""
    hidden, weight, labels, upstream = wide()
    one, many = (
        gradients(lambda h, w, n=size: token_logprobs(h, w, labels, logits_at_once=64 * n), hidden, weight, upstream)
        for size in (1000, 7)
    )
    errors = [relative(a.float(), b.float()) for a, b in zip(many, one, strict=True)]
    print([f"{error:.1e}" for error in errors])
    assert max(errors) <= 5e-6  # measured 2.4e-7 to 1.1e-6, by machine; with products rounded to bf16 5.1e-3
