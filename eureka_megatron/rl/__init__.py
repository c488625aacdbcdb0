"""Reinforcement learning as pure tensor functions: advantages, losses, group filters and log-probabilities.

Nothing here knows Megatron, torch.distributed or a configuration object. Where a quantity belongs to the whole job (a
token count, a mean over data-parallel ranks), it comes in as a number or as a callable that reduces.
"""
