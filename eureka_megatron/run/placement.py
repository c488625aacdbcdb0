"""The seats of seats.py taken on Ray's cluster: GPUs reserved by a placement group, ranks and engines told where to start, and the table of it.

Every tensor-parallel group has a bundle of its GPUs, and so has every engine that shares none; the planner has chosen the node of each. Colocated
engines ask Ray for no GPU: they see those of their ranks, by CUDA_VISIBLE_DEVICES, on the same node.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import UserError
from eureka_megatron.run.seats import Demand, Node, plan
from eureka_megatron.tracking.console import tell_table
from eureka_megatron.train.actor import ALLOCATOR, Seat, own_seat

FILE = "topology.json"
RESERVE_SECONDS = 60.0  # that GPUs of runs before may take to come free
_NODE = "ray.io/node-id"  # the label that Ray gives each node


class Placement:
    """Seats for the run's ranks and engines; on GPUs they are reserved until `close`. Ray must be initialised.

    Args:
        engines: whether the run has any; supervised training has none.

    Raises:
        ConfigError: the cluster has no room; says what would fit.
        UserError: others have the GPUs.
    """

    def __init__(self, config: RunConfig, *, engines: bool = True) -> None:
        self.demand = Demand.of(config, engines=engines)
        self.nodes = cluster_nodes()
        self.seats = plan(self.nodes, self.demand)
        self.on_gpu = any(node.gpus for node in self.nodes)
        self._output: Path = config.run.output
        self._group: PlacementGroup | None = self._reserve() if self.on_gpu else None
        self._told: list[dict[str, Any]] = []

    def rank_options(self) -> list[dict[str, Any]]:
        """Ray's options for the trainer's actors, node by node; TrainerGroup gives the ranks out."""
        return [
            self._options(node, bundle)
            for bundle, node in enumerate(self.seats.groups)
            for _ in range(self.demand.tensor)
        ]

    def engine_options(self, ranks: Sequence[Seat] = ()) -> list[dict[str, Any]]:
        """Ray's options for each engine's actor. ranks: where the trainer's ranks have come to sit; for colocated engines."""
        if not (self.on_gpu and self.demand.colocated):
            return [self._options(node, len(self.seats.groups) + e) for e, node in enumerate(self.seats.engines)]
        size = self.demand.engine_tensor
        hosts = [ranks[e * size : (e + 1) * size] for e in range(self.demand.engines)]
        assert all(len({seat.node for seat in own}) == 1 for own in hosts), "an engine's GPUs are of one node"
        return [_guest(own) for own in hosts]

    def tell(self, ranks: Sequence[Seat], engines: Sequence[Any] = ()) -> None:
        """Print who sits where, and write it to `run.output`/topology.json. engines: handles, which must be up."""
        names = {node.id: node.name for node in self.nodes}
        self._told = [_line("trainer", rank, seat, names) for rank, seat in enumerate(ranks)]
        found = ray.get([engine.__ray_call__.remote(_seat_of) for engine in engines])
        self._told += [_line("engine", number, seat, names) for number, seat in enumerate(found)]
        size = self.demand.tensor
        groups = [self._told[first : first + size] for first in range(0, len(ranks), size)]
        rows = [_row(lines) for lines in (*groups, *([line] for line in self._told[len(ranks) :]))]
        tell_table(["node", "GPU", "role", "rank"], rows)
        self._write()

    def replaced(self, number: int, engine: Any) -> None:
        """Bring the line of an engine up to date that has been started anew."""
        seat = ray.get(engine.__ray_call__.remote(_seat_of))
        names = {node.id: node.name for node in self.nodes}
        place = next(i for i, line in enumerate(self._told) if (line["role"], line["rank"]) == ("engine", number))
        self._told[place] = _line("engine", number, seat, names)
        self._write()

    def close(self) -> None:
        """Give the GPUs back; whoever still sits there is ended."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _reserve(self) -> PlacementGroup:
        own = () if self.demand.colocated else self.seats.engines
        bundles = [{"GPU": self.demand.tensor}] * len(self.seats.groups) + [{"GPU": self.demand.engine_tensor}] * len(
            own
        )
        nodes = [{_NODE: node.id} for node in (*self.seats.groups, *own)]
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=nodes)
        if not group.wait(RESERVE_SECONDS):
            remove_placement_group(group)
            free = ray.available_resources().get("GPU", 0)
            total = sum(node.gpus for node in self.nodes)
            raise UserError(
                f"this run needs {self.demand.gpus} of the cluster's {total} GPUs, but others have them: {free:g} are free; wait, or end "
                "what runs there (ray list actors)"
            )
        return group

    def _options(self, node: Node, bundle: int) -> dict[str, Any]:
        if self._group is None:
            return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        }

    def _write(self) -> None:
        placement = "colocated" if self.demand.colocated else "split"
        lines = ",\n".join(f"    {json.dumps(line)}" for line in self._told)
        self._output.mkdir(parents=True, exist_ok=True)
        fresh = self._output / f"{FILE}.new"
        fresh.write_text(f'{{\n  "placement": "{placement}",\n  "seats": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
        fresh.replace(self._output / FILE)


def cluster_nodes() -> list[Node]:
    """Ray's living nodes in the order of their addresses: 10.0.0.9 comes before 10.0.0.10."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (_natural(node["NodeManagerAddress"]), node["NodeID"]))
    names = [node["NodeManagerHostname"] for node in alive]
    return [
        Node(
            id=node["NodeID"],
            name=name if names.count(name) == 1 else f"{name}/{place}",
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for place, (node, name) in enumerate(zip(alive, names, strict=True))
    ]


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _guest(own: Sequence[Seat]) -> dict[str, Any]:
    seen = {
        "CUDA_VISIBLE_DEVICES": ",".join(gpu for seat in own for gpu in seat.gpus),
        # Ray leaves that variable alone for an actor that asks for no GPU, unless this one says otherwise.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    # Sleep mode and expandable segments exclude each other.
    seen |= {name: "expandable_segments:False" for name in ALLOCATOR if "expandable" in os.environ.get(name, "")}
    affinity = NodeAffinitySchedulingStrategy(own[0].node, soft=False)
    return {"num_gpus": 0, "scheduling_strategy": affinity, "runtime_env": {"env_vars": seen}}


def _seat_of(_: Any) -> Seat:
    return own_seat()


def _line(role: str, rank: int, seat: Seat, names: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "rank": rank, "node": names[seat.node], "gpus": list(seat.gpus), "pid": seat.pid}


def _row(lines: Sequence[dict[str, Any]]) -> list[str]:
    """One row for an engine, or for a tensor-parallel group."""
    gpus = [gpu for line in lines for gpu in line["gpus"]]
    first, last = lines[0]["rank"], lines[-1]["rank"]
    return [
        lines[0]["node"],
        ",".join(gpus) or "–",
        lines[0]["role"],
        f"{first}" if first == last else f"{first}–{last}",
    ]
