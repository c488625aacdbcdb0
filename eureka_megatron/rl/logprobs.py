"""Log-probabilities and entropies of taken tokens, from hidden states and the (vocabulary-parallel) output weight.

Works through the rows in chunks, forward and backward: [tokens, vocabulary] never exists, only [chunk, vocabulary / tp]. The backward
recomputes each chunk's logits, as in Cut Cross-Entropy (arXiv:2411.09009, section 3), without its sparsification: gradients are exact.

Shapes: T rows, C rows of a chunk, H hidden, V' = vocabulary / tensor-parallel size (this rank's rows of the weight).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 1024


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ)[label] and the entropy of each row, both fp32 [T], in nats.

    Args:
        hidden_TH: final hidden states, equal on all ranks of `group`. Its gradient is this rank's partial sum: the caller's
            gather or copy into the tensor-parallel region adds the parts.
        weight_VH: this rank's rows of the output weight; rank r holds words r·V' … (r+1)·V'.
        labels_T: int64, the taken tokens.
        group: tensor-parallel group; None: the weight is whole.
    """
    return _TokenLogprobs.apply(hidden_TH, weight_VH, labels_T, group, chunk_rows)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: Any, chunk_rows: int) -> Any:
        offset = dist.get_rank(group) * len(weight) if group is not None else 0
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies, log_sums = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), chunk_rows):
            logits = (hidden[rows] @ weight.T).float()
            largest = _reduce(logits.amax(-1), group, dist.ReduceOp.MAX)
            shifted = logits - largest[:, None]
            weights = shifted.exp()
            own, place = _own(labels[rows], offset, len(weight))
            # Three sums travel as one: of exp, of exp · shifted logit, and the label's shifted logit (zero where it is not ours).
            taken = torch.where(own, shifted.gather(-1, place[:, None])[:, 0], 0.0)
            sums = _reduce(torch.stack((weights.sum(-1), (weights * shifted).sum(-1), taken)), group, dist.ReduceOp.SUM)
            log_sum = sums[0].log()
            logprobs[rows] = sums[2] - log_sum
            entropies[rows] = log_sum - sums[1] / sums[0]
            log_sums[rows] = log_sum + largest
        ctx.save_for_backward(hidden, weight, labels, log_sums, entropies)
        ctx.offset, ctx.chunk_rows = offset, chunk_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, labels, log_sums, entropies = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(hidden), ctx.chunk_rows):
            log_p = (hidden[rows] @ weight.T).float() - log_sums[rows, None]
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logprobs is not None:  # d logp[label] / d logits = onehot − p
                own, place = _own(labels[rows], ctx.offset, len(weight))
                grad.scatter_(-1, place[:, None], own[:, None].float()).sub_(p).mul_(grad_logprobs[rows, None])
            if grad_entropies is not None:  # d entropy / d logits = −p (log p + entropy)
                grad -= grad_entropies[rows, None] * p * (log_p + entropies[rows, None])
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _own(labels: Tensor, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in this rank's part, and their place there (0 for the others)."""
    place = labels - offset
    own = (place >= 0) & (place < size)
    return own, torch.where(own, place, 0)


def _reduce(values: Tensor, group: Any, op: Any) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
