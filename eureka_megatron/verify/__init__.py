"""`eureka verify`: the native model at a parallel layout against transformers, on the same checkpoint, in fp32 or as it trains, in bf16.

`samples` makes them up, `reference` lets transformers compute them, `measure` (or `rounding`) compares on every rank of a `job`, `command` is what the
command line calls.
"""

from eureka_megatron.layout import Execution, Layout
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.measure import BARS, measure
from eureka_megatron.verify.reference import write_reference
from eureka_megatron.verify.samples import made_up_samples

__all__ = ["BARS", "Execution", "Job", "Layout", "made_up_samples", "measure", "write_reference"]
