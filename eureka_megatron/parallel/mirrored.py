"""How context-parallel ranks share the rows of a packed row. Pure."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np


def mirrored_rows(segments: Sequence[int], ranks: int) -> list[np.ndarray]:
    """int64, by rank: its rows. Of 2 · ranks chunks of every segment rank r has chunks r and 2 · ranks − 1 − r.

    Two ranks, a segment of 8 rows: chunks 0 1 | 2 3 | 4 5 | 6 7, rows 0 1 6 7 for rank 0 and 2 3 4 5 for rank 1.
    """
    rows: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(ranks)]
    for start, end in pairwise(accumulate(segments, initial=0)):
        chunks = np.arange(start, end).reshape(2 * ranks, -1)
        for rank in range(ranks):
            rows[rank] += [chunks[rank], chunks[-1 - rank]]
    return [np.concatenate(parts) for parts in rows]


def order_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """int64: where each row stands when the ranks' rows are laid end to end.

    Laid so, the rows of the example are 0 1 6 7 2 3 4 5, and row 6 stands third: the order is 0 1 4 5 6 7 2 3.
    """
    return np.argsort(np.concatenate(rows))
