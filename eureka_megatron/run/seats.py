"""Who sits where: the trainer's tensor-parallel groups and the engines on the nodes of a cluster. Pure; what Ray does is in placement.py.

A tensor-parallel group and an engine never leave their node. Nodes are filled in their order, so consecutive ranks are neighbours:

    nodes of 8, parallel.tensor 4, 12 ranks, 3 engines of 2         node a   ranks 0–3, ranks 4–7
                                                                    node b   ranks 8–11, engine 0, engine 1
                                                                    node c   engine 2

Colocated, engine e is a guest on the GPUs of ranks e·N … e·N + N - 1 (N = rollout.tensor), so groups are seated in blocks that both sizes divide.
Without GPUs groups and engines are spread evenly, as far from each other as the nodes allow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import ConfigError
from eureka_megatron.tracking.console import counted


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. Example: Node(id="84ae35…", name="gpu07", gpus=8)."""

    id: str  # Ray's
    name: str
    gpus: int


@dataclass(frozen=True)
class Demand:
    """What a run wants seated. Example: 7B at tensor 4, data 2 and eight engines of one GPU: Demand(4, 1, 2, 8, 1, False)."""

    tensor: int  # ranks of a tensor-parallel group
    groups: int  # such groups of one model replica: stages × context-parallel ranks
    data: int  # replicas
    engines: int
    engine_tensor: int
    colocated: bool

    @classmethod
    def of(cls, config: RunConfig, *, engines: bool = True) -> Demand:
        """engines: whether the run has any; supervised training has none."""
        parallel, rollout = config.parallel, config.rollout
        return cls(
            tensor=parallel.tensor,
            groups=parallel.pipeline * parallel.context,
            data=parallel.data,
            engines=rollout.engines if engines else 0,
            engine_tensor=rollout.tensor,
            colocated=config.placement == "colocated" and engines,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.groups * self.data

    @property
    def gpus(self) -> int:
        return self.world_size + (0 if self.colocated else self.engines * self.engine_tensor)

    @property
    def divides(self) -> bool:
        """Whether colocated engines can have equal parts of the ranks."""
        return self.world_size % max(1, self.engines * self.engine_tensor) == 0

    @property
    def block(self) -> int:
        """Ranks that must lie on one node."""
        return math.lcm(self.tensor, self.engine_tensor) if self.colocated else self.tensor

    def __str__(self) -> str:
        """Example: `8 trainer ranks, 1 engine × 2`."""
        ranks = counted(self.world_size, "trainer rank")
        engines = f"{counted(self.engines, 'engine')} × {self.engine_tensor}"
        return f"{ranks}, {engines}{' on the same GPUs' if self.colocated else ''}" if self.engines else ranks


@dataclass(frozen=True)
class Seats:
    """The node of each tensor-parallel group, in the order of ranks, and of each engine."""

    groups: tuple[Node, ...]
    engines: tuple[Node, ...]


def plan(nodes: Sequence[Node], demand: Demand) -> Seats:
    """Seats for everybody; nodes are taken in the given order.

    Raises:
        ConfigError: there is no room; says what there is and what would fit.
    """
    seats = _seated(nodes, demand) if any(node.gpus for node in nodes) else _spread(nodes, demand)
    if seats is None:
        raise ConfigError(_refusal(nodes, demand))
    return seats


def check_seats(demand: Demand, nodes: int, gpus: int) -> None:
    """Refuse a run that so many nodes of so many GPUs have no room for. Raises ConfigError, which says how many nodes would do."""

    def refusal(count: int) -> ConfigError | None:
        try:
            plan([Node(str(number), f"node {number}", gpus) for number in range(count)], demand)
        except ConfigError as error:
            return error
        return None

    if error := refusal(nodes):
        enough = next((count for count in range(nodes + 1, demand.gpus + 1) if refusal(count) is None), None)
        raise ConfigError(f"{error}{f', or --nodes {enough}' if enough else ''}")


def _seated(nodes: Sequence[Node], demand: Demand) -> Seats | None:
    blocks = demand.world_size // demand.block, demand.block
    guests = demand.engines if demand.colocated else 0
    engines = demand.engines - guests, demand.engine_tensor
    for trainer_first in (True, False):  # one of the two orders may leave no hole that the other does
        free = [node.gpus for node in nodes]
        first = _fill(free, *(blocks if trainer_first else engines))
        second = _fill(free, *(engines if trainer_first else blocks))
        if first is None or second is None:
            continue
        seated, own = (first, second) if trainer_first else (second, first)
        groups = [nodes[place] for place in seated for _ in range(demand.block // demand.tensor)]
        hosts = [seated[engine * demand.engine_tensor // demand.block] for engine in range(guests)]
        return Seats(tuple(groups), tuple(nodes[place] for place in hosts or own))
    return None


def _fill(free: list[int], count: int, size: int) -> list[int] | None:
    """Places of `count` units of `size` GPUs, each on the first node with room; what they take is subtracted from `free`."""
    places = []
    for _ in range(count):
        place = next((place for place, gpus in enumerate(free) if gpus >= size), None)
        if place is None:
            return None
        free[place] -= size
        places.append(place)
    return places


def _spread(nodes: Sequence[Node], demand: Demand) -> Seats:
    count = demand.groups * demand.data
    groups = [nodes[group * len(nodes) // count] for group in range(count)]
    if demand.colocated:
        hosts = [groups[engine * demand.engine_tensor // demand.tensor] for engine in range(demand.engines)]
        return Seats(tuple(groups), tuple(hosts))
    ranks, guests = Counter(node.id for node in groups), Counter[str]()
    engines = []
    for _ in range(demand.engines):
        node = min(nodes, key=lambda node: (guests[node.id], ranks[node.id]))
        guests[node.id] += 1
        engines.append(node)
    return Seats(tuple(groups), tuple(engines))


def _refusal(nodes: Sequence[Node], demand: Demand) -> str:
    largest, total = max(node.gpus for node in nodes), sum(node.gpus for node in nodes)
    sizes = {"parallel.tensor": demand.tensor} | ({"rollout.tensor": demand.engine_tensor} if demand.engines else {})
    if demand.block > max(sizes.values()):
        sizes["the least common multiple of parallel.tensor and rollout.tensor (placement=colocated)"] = demand.block
    for key, size in sizes.items():
        if size > largest:
            return (
                f"{key}={size} needs so many GPUs on one node, the largest has {largest}: at most {largest}"
                f"{', and parallel.pipeline for a model that is larger' if key == 'parallel.tensor' else ''}"
            )
    where = f"{total}" if len(nodes) == 1 else f"{total} on {len(nodes)} nodes"
    apart = f", each on one node with {largest} at most" if total >= demand.gpus else ""
    fitting = _fitting(nodes, demand) or ["a smaller parallel.tensor or parallel.pipeline, or more GPUs"]
    return f"this run needs {demand.gpus} GPUs ({demand}{apart}), the cluster has {where}: {', or '.join(fitting)}"


def _fitting(nodes: Sequence[Node], demand: Demand) -> list[str]:
    """Changes of single keys that would fit, as they would be written."""
    found = []
    if demand.engines and not demand.colocated:
        all_ranks = demand.world_size // demand.engine_tensor
        together = replace(demand, colocated=True, engines=demand.engines if demand.divides else all_ranks)
        if together.engines and together.divides and _seated(nodes, together):
            changed = "" if together.engines == demand.engines else f" rollout.engines={together.engines}"
            found.append(f"placement=colocated{changed}")
    for data in range(demand.data - 1, 0, -1):
        fewer = replace(demand, data=data)
        if (fewer.divides or not demand.colocated) and _seated(nodes, fewer):
            found.append(f"parallel.data={data}")
            break
    for count in range(0 if demand.colocated else demand.engines - 1, 0, -1):
        if _seated(nodes, replace(demand, engines=count)):
            found.append(f"rollout.engines={count}")
            break
    return found
