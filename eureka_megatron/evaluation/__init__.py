"""Judging answers to the six benchmarks, and the demo's, by pure rules: no vLLM and no torch."""

from eureka_megatron.evaluation.judging import BENCHMARKS, judge_official, judge_paper
from eureka_megatron.evaluation.verdict import Verdict
from eureka_megatron.evaluation.wemath import wemath_scores

__all__ = ["BENCHMARKS", "Verdict", "judge_official", "judge_paper", "wemath_scores"]
