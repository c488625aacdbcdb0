"""Rule-based rewards: is the answer right, does the response keep its form, is it too long or repetitive.

`score` judges one response in this process, bounded by construction but without a clock; training runs it through
`JudgePool`, which adds hard limits on time and memory. `RemoteReward` asks a reward service instead; `Rewarder` is what a run uses. Nothing in this
package imports torch: judge workers start in a fraction of a second.
"""

from eureka_megatron.rewards.examine import parseable_gold
from eureka_megatron.rewards.judge import JudgePool
from eureka_megatron.rewards.remote import RemoteReward
from eureka_megatron.rewards.response import Response
from eureka_megatron.rewards.rewarder import Rewarder, RewardRules
from eureka_megatron.rewards.scoring import DEFAULT_WEIGHTS, ScoringRules, score

__all__ = [
    "DEFAULT_WEIGHTS",
    "JudgePool",
    "RemoteReward",
    "Response",
    "RewardRules",
    "Rewarder",
    "ScoringRules",
    "parseable_gold",
    "score",
]
