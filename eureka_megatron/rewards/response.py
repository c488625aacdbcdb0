"""A response to be judged, as every judge takes it: the rules, a user's function, a service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rewards = dict[str, float]  # by name: "accuracy", "total" and whatever else there is
LARGEST_REWARD = 1e18  # sums of squares of rewards stay finite in float32


@dataclass(frozen=True)
class Response:
    """Example: id "7", prompt "2+2?", response "<think>…</think><answer>4</answer>", answer "4", length_tokens 12."""

    response: str
    answer: object
    id: str = ""
    prompt: str = ""
    length_tokens: int = 0

    def __getitem__(self, name: str) -> Any:
        """As in the dictionary that a user's function gets: a user's own judge reads both alike."""
        return getattr(self, name)


Judged = Response | Mapping[str, Any] | Sequence[Any]


def as_row(sample: Judged) -> dict[str, Any]:
    """What a user's function gets, from a record, a dictionary with at least "response" and "answer", or such a pair.

    "query" is the whole text, which services judge; where nobody gave the prompt, the response alone.
    """
    if isinstance(sample, Mapping):
        return {"prompt": "", "query": sample["response"], **sample}
    row = vars(sample if isinstance(sample, Response) else Response(*sample))
    return {**row, "query": row["prompt"] + row["response"]}
