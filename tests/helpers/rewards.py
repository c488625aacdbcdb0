"""Rewards that differ within a group whatever a random model says, so that one step changes its weights."""


def by_characters(samples: list[dict]) -> list[dict[str, float]]:
    """A number in [0, 1] made from the response's characters."""
    return [{"accuracy": sum(map(ord, sample["response"])) % 7 / 6, "format": 0.0} for sample in samples]
