"""A rank of a deep model, from rehearsals of two shallow twins: layers are alike, so that every count is linear in their number.

A stage with one and with two layers a chunk tells what a layer adds, and what does not depend on it. Tests hold the line against whole rehearsals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.planning.load import Load, Shape, layers_of
from eureka_megatron.planning.rehearsal import Plan, Rehearsal, deepened, in_this_process
from eureka_megatron.planning.workload import Workload
from eureka_megatron.train.step import Objective

# Operations of torch.distributed → how many bytes leave a rank, for each byte of what is handed over first (a ring's; n ranks).
_SENT: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), lambda n: 2 * (n - 1) / n),
    **dict.fromkeys(
        ("_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
        lambda n: (n - 1) / n,
    ),
    **dict.fromkeys(
        ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "scatter_"), lambda n: n - 1
    ),
    **dict.fromkeys(("alltoall_", "alltoall_base_", "gather_"), lambda n: (n - 1) / n),
    **dict.fromkeys(("broadcast_", "reduce_", "send"), lambda n: 1),
    **dict.fromkeys(("recv_", "recv_any_source_", "barrier"), lambda n: 0),
}


PLAIN, ADAM = Objective("ppo_clip", {}), OptimizerSection()


@dataclass(frozen=True)
class Twin:
    """A rank of `stage`: the first of its tensor-, context- and data-parallel groups.

    objective: None: supervised training.
    """

    model: Path
    shape: Shape
    stage: int
    freeze: tuple[str, ...]
    objective: Objective | None = PLAIN
    optimizer: OptimizerSection = ADAM
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


def rehearse_twin(twin: Twin) -> Load:
    """In this process, which does nothing else."""
    shape, config = twin.shape, read_hf_config(twin.model)
    layout = shape.layout.model_copy(update={"layers_first_stage": None, "layers_last_stage": None})
    few = layout.virtual_pipeline, 2 * layout.virtual_pipeline
    rows = layout.pipeline * (2 if layout.virtual_pipeline > 1 else 1)
    reference = twin.objective is not None and bool(twin.objective.options.get("kl_coefficient"))
    found = []
    for layers in few:
        plan = Plan(
            twin.model,
            layout,
            Execution(dtype=twin.dtype, recompute=shape.recompute),
            Workload(
                shape.tokens,
                shape.longest,
                shape.pixels,
                rows,
                rollouts=twin.objective is not None,
                reference=reference,
            ),
            shape.tokens,
            freeze=twin.freeze,
            optimizer=twin.optimizer,
            objective=twin.objective,
            on_gpu=twin.dtype == "bfloat16",
            layers=layers * layout.pipeline,
        )
        found.append(in_this_process(plan, _rank(layout, twin.stage)))
    one, two = found
    return load_of(deepened(one, two, few, layers_of(config, shape.layout, twin.stage)), layout, twin.stage)


def _rank(layout: Layout, stage: int) -> int:
    """Ranks are numbered by tensor, context, data, pipeline."""
    return stage * layout.tensor * layout.context * layout.data


def load_of(rehearsal: Rehearsal, layout: Layout, stage: int) -> Load:
    """Of one micro-batch."""
    rows = rehearsal.micro_batches
    sizes = {"tensor": layout.tensor, "context": layout.context, "pipeline": layout.pipeline, "data": layout.data}
    sizes["world"] = layout.world_size
    sent = dict.fromkeys(sizes, 0.0)
    for (operation, group), nbytes in rehearsal.collectives.items():
        # The gradient of a tied embedding, between the two ends of a pipeline (a group without a name, if there are other stages).
        ends = operation == "allreduce_" and group in ("pipeline", "2 ranks")
        if group in sizes or ends:
            once = ends or "coalesced" in operation  # an update: gradients of what ranks share, and parameters
            sent["data" if once else group] += nbytes * _SENT[operation](2 if ends else sizes[group])
    parts: Mapping[str, int] = rehearsal.operations_by_part
    vision = sum(number for part, number in parts.items() if part.startswith("vision"))
    attention = parts["text attention"]
    return Load(
        stage=stage,
        parameters=rehearsal.parameters,
        gradients=rehearsal.gradients,
        optimizer=rehearsal.optimizer,
        passes=max(rehearsal.ahead, rehearsal.passes),
        update=rehearsal.update,
        vision=vision / rows,
        linears=(rehearsal.operations - vision - attention) / rows,
        attention=attention / rows,
        moved=rehearsal.moved / rows,
        moved_by_update=rehearsal.moved_by_update,
        tensor=sent["tensor"] / rows,
        context=sent["context"] / rows,
        pipeline=sent["pipeline"] / rows,
        data=sent["data"],
        rehearsed=True,
    )
