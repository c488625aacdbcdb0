"""Log-probabilities and entropies of taken tokens, from hidden states and the (vocabulary-parallel) output weight.

Works through the vocabulary in blocks, forward and backward: [tokens, vocabulary] never exists, only [tokens, block]. The backward
computes each block's logits again, as in Cut Cross-Entropy (arXiv:2411.09009, section 3), without its sparsification: gradients are
exact. Blocks of the vocabulary rather than of rows: a block's gradient of the weight is then finished at once, with no sum over blocks to
hold. tools/benchmark/logprobs.py measures it: with 8,192 rows and a vocabulary of 152,064 tokens 0.15 GiB beyond inputs and results, where the
naive way takes 13.

Shapes: T rows, H hidden, V' = vocabulary / tensor-parallel size (this rank's rows of the weight), B tokens of a block of the vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# T · B: 128 MiB in fp32, of which two are held at a time.
LOGITS_AT_ONCE = 1 << 25


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature)[label] and the entropy of each row, both fp32 [T], in nats.

    Args:
        hidden_TH: final hidden states, equal on all ranks of `group`. Its gradient is this rank's partial sum: the caller's
            gather or copy into the tensor-parallel region adds the parts.
        weight_VH: this rank's rows of the output weight; rank r holds tokens r·V' … (r+1)·V'.
        labels_T: int64, the taken tokens.
        group: tensor-parallel group; None: the weight is whole.
        temperature: of the policy, > 0. Logits are divided by it in fp32, as engines do when they sample.
        logits_at_once: bounds the memory: how many logits exist at a time. Results do not depend on it.
    """
    return _TokenLogprobs.apply(hidden_TH, weight_VH, labels_T, group, temperature, logits_at_once)


class _Sums(NamedTuple):
    """Of the part of the vocabulary seen so far, for each row: the largest logit m, Σ exp(x − m) and Σ exp(x − m) · (x − m)."""

    largest_T: Tensor
    total_T: Tensor
    weighted_T: Tensor

    def above(self, largest_T: Tensor) -> "_Sums":
        """The same sums with another m."""
        shift = self.largest_T - largest_T
        scale = shift.exp()
        return _Sums(largest_T, self.total_T * scale, (self.weighted_T + self.total_T * shift) * scale)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: Any, temperature: float, logits_at_once: int
    ) -> Any:
        labels = labels - (dist.get_rank(group) * len(weight) if group is not None else 0)
        taken = hidden.new_zeros(len(hidden), dtype=torch.float32)
        sums: _Sums | None = None
        blocks = _blocks(len(weight), len(hidden), logits_at_once)
        for block in blocks:
            logits = token_logits(hidden, weight[block], temperature)
            here, places = _labels_in(labels, block)
            taken = torch.where(here, logits.gather(1, places[:, None])[:, 0], taken)
            sums = _add(sums, logits)
            del logits
        assert sums is not None  # a vocabulary has tokens
        logprobs, entropies, log_total = _finish(sums, taken, group)
        ctx.save_for_backward(hidden, weight, labels, log_total, entropies)
        ctx.blocks, ctx.temperature = blocks, temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, labels, log_total, entropies = ctx.saved_tensors
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        if ctx.temperature != 1.0:  # d(logit / T)/d(logit): all that follows is linear in the two
            grad_logprobs, grad_entropies = (
                None if grad is None else grad / ctx.temperature for grad in (grad_logprobs, grad_entropies)
            )
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if learns_hidden else None
        grad_weight = torch.empty_like(weight) if learns_weight else None
        for block in ctx.blocks:
            log_p = token_logits(hidden, weight[block], ctx.temperature).sub_(log_total[:, None])
            grad = _logit_gradients(log_p, entropies, grad_logprobs, grad_entropies)
            if grad_logprobs is not None:
                here, places = _labels_in(labels, block)
                grad.scatter_add_(1, places[:, None], torch.where(here, grad_logprobs, 0.0)[:, None])
            # bf16 operands for tensor cores. Each element is rounded in proportion to itself, and the sums stay in fp32: the gradients
            # are off by little more than their own rounding to bf16 (3.6e-3 against 2.5e-3 of the largest, test_logprobs).
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += _product(grad, weight[block])
            if grad_weight is not None:
                torch.mm(grad.T, hidden, out=grad_weight[block])
            del log_p, grad  # before the next block's are made
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _blocks(vocabulary: int, rows: int, logits_at_once: int) -> list[slice]:
    size = max(1, min(vocabulary, logits_at_once // max(rows, 1)))
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def token_logits(hidden_TH: Tensor, weight_VH: Tensor, temperature: float = 1.0) -> Tensor:
    """fp32 [T, V']: sums of products of bf16 numbers, never rounded to bf16 themselves, whose spacing between 16 and 32 is 0.125."""
    logits = _product(hidden_TH, weight_VH.T)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, whatever the operands are."""
    if left.dtype != torch.float32 and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)  # tensor cores; torch has it for CUDA alone
    return left.float() @ right.float()


def _labels_in(labels: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Whether each row's label is in this block, and where in it (anywhere, if it is not): [T] both, so that nobody need count them."""
    here = (labels >= block.start) & (labels < block.stop)
    return here, (labels - block.start).clamp(0, block.stop - block.start - 1)


def _logit_gradients(
    log_p: Tensor, entropies: Tensor, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
) -> Tensor:
    """What reaches the logits, but for the labels' own part: −p · (g + h (log p + entropy)) of the gradients g, h of a row's log-probability
    and entropy. Overwrites log p."""
    if grad_entropies is None:
        assert grad_logprobs is not None  # else nothing would ask for gradients
        return log_p.exp_().mul_(grad_logprobs[:, None]).neg_()
    p = log_p.exp()
    factor = log_p.add_(entropies[:, None]).mul_(grad_entropies[:, None])
    if grad_logprobs is not None:
        factor += grad_logprobs[:, None]
    return p.mul_(factor).neg_()


def _add(sums: _Sums | None, logits: Tensor) -> _Sums:
    """The sums with this block too; overwrites the logits."""
    largest = logits.amax(-1) if sums is None else torch.maximum(sums.largest_T, logits.amax(-1))
    shifted = logits.sub_(largest[:, None])
    weights = shifted.exp()
    total, weighted = weights.sum(-1), weights.mul_(shifted).sum(-1)
    if sums is not None:
        before = sums.above(largest)
        total, weighted = total + before.total_T, weighted + before.weighted_T
    return _Sums(largest, total, weighted)


def _finish(sums: _Sums, taken: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """→ log-probability of the label, entropy and log Σ exp of all logits, over the vocabulary of all ranks."""
    if group is not None and dist.get_world_size(group) > 1:
        largest = sums.largest_T.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = sums.above(largest)
        # Three sums travel as one; the label's logit is zero on ranks that do not hold it.
        parts = torch.stack((sums.total_T, sums.weighted_T, taken))
        dist.all_reduce(parts, group=group)
        sums, taken = _Sums(largest, parts[0], parts[1]), parts[2]
    log_total = sums.total_T.log()
    logprobs = taken - sums.largest_T - log_total
    return logprobs, log_total - sums.weighted_T / sums.total_T, log_total + sums.largest_T
