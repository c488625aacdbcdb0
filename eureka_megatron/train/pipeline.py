"""What stages of a pipeline send each other. Every rank knows the rows of all micro-batches, so nobody has to be told a shape.

Megatron has stages of uneven rows tell each other the shape of each tensor before they send it: small messages for which, on a GPU, the host waits
until everything before them is done, twice a micro-batch and stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.types import MicroBatch


def received(rows: Sequence[Any], layout: Layout, stage: int) -> tuple[list[Any], list[Any]]:
    """(from the stage before, from the one after): what a stage receives, in order, of micro-batches 0, 1, … that leave every stage as `rows`.

    Micro-batches go through a virtual pipeline in groups of as many as there are stages, chunk after chunk; backward the chunks come in reverse.
    Rows a b c d, two stages, two chunks, stage 0, which has the embedding:  from before  a b  c d  (chunk 1 only),  from after  a b a b  c d c d.
    """
    stages, chunks = layout.pipeline, range(layout.virtual_pipeline)
    size = stages if len(chunks) > 1 else 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    before = [row for group in groups for chunk in chunks for row in group if stage or chunk]
    after = [
        row for group in groups for chunk in chunks for row in group if stage < stages - 1 or chunk < len(chunks) - 1
    ]
    return before, after


class ToldShapes(P2PCommunicator):
    """Megatron's, which knows what it will receive.

    before, after: shapes of what comes from the stage before, and from the one after, in order.
    """

    def __init__(self, config: TransformerConfig, before: Iterator[list[int]], after: Iterator[list[int]]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self.before, self.after = before, after

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        return next(self.before) if recv_prev else [0, 0, 0], next(self.after) if recv_next else [0, 0, 0]


def communication(config: TransformerConfig, micro_batches: Sequence[MicroBatch], parallel: Parallel) -> dict[str, Any]:
    """For Megatron's schedules: who sends what to whom. Empty without a pipeline."""
    layout = parallel.layout
    if layout.pipeline == 1:
        return {}
    shared = layout.context * (layout.tensor if layout.sequence_parallel else 1)
    rows = [[batch.tokens // shared, 1, config.hidden_size] for batch in micro_batches]
    before, after = received(rows, layout, parallel.pipeline.rank)
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"p2p_communicator": ToldShapes(config, iter(before), iter(after)), "pg_collection": groups}
