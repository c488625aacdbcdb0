"""Which prompt groups carry a learning signal (online filter, MM-EUREKA; dynamic sampling, DAPO arXiv:2503.14476).

Left out on purpose: the buffer of survivors, freezing steps and bounded re-sampling belong to the rollout collector.

Shape suffixes: G groups (prompts), N samples of a group.
"""

import torch
from torch import Tensor

# Accuracies are k/n with n at most a few hundred, so two different means lie much further apart than this.
_BOUND_TOLERANCE = 1e-6


def keep_groups(accuracy_GN: Tensor, *, lower: float = 0.1, upper: float = 0.9, compat: str | None = None) -> Tensor:
    """Keep a group iff lower <= mean accuracy <= upper, both bounds included.

    accuracy_GN: accuracy of every sample, in [0, 1]. Returns kept_G, bool.

    The mean is taken in float64 with a tolerance of 1e-6, so 8 right answers of 10 lie on a bound of 0.8, not beside
    it. `compat="mm_eureka"` takes the mean in float32 and compares it with the double bound, as the original does:
    there 8/10 against an upper bound of 0.8 is dropped. Crossed bounds keep nothing; the configuration refuses them.
    """
    if accuracy_GN.ndim != 2 or accuracy_GN.shape[1] == 0:
        raise ValueError(
            f"accuracy_GN must be [groups, samples] with at least one sample, got {list(accuracy_GN.shape)}"
        )
    if compat == "mm_eureka":
        mean_G = accuracy_GN.to(torch.float32).mean(dim=1).double()
        return (mean_G >= lower) & (mean_G <= upper)
    if compat is not None:
        raise ValueError(f"unknown compat {compat!r}; known: 'mm_eureka' or None")
    mean_G = accuracy_GN.double().mean(dim=1)
    return (mean_G >= lower - _BOUND_TOLERANCE) & (mean_G <= upper + _BOUND_TOLERANCE)


def outcome_counts(accuracy_GN: Tensor) -> dict[str, int]:
    """How many groups are all wrong, mixed, all right: the true counts before any filter.

    Example: accuracies [[0, 0], [0, 1], [1, 1], [1, 1]] give {"all_wrong": 1, "mixed": 1, "all_right": 2}.
    """
    all_wrong_G = (accuracy_GN <= 0).all(dim=1)
    all_right_G = (accuracy_GN >= 1).all(dim=1)
    mixed = accuracy_GN.shape[0] - int(all_wrong_G.sum()) - int(all_right_G.sum())
    return {"all_wrong": int(all_wrong_G.sum()), "mixed": mixed, "all_right": int(all_right_G.sum())}
