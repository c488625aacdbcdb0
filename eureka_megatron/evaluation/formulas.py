"""What the isolated process of `symbolic` loads: the parsers, and one formula through them, before any time limit runs.

On a busy machine the first formula took longer to import its parser than it may take to be judged.
"""

from eureka_megatron.evaluation.symbolic import judge_rows, parse

__all__ = ["judge_rows"]

parse("\\frac{1}{2}")
