"""Who sits where, on clusters of every size, and what is said where there is no room."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from eureka_megatron.config import make_config
from eureka_megatron.errors import ConfigError
from eureka_megatron.run.seats import Demand, Node, Seats, plan


def nodes(*gpus: int) -> list[Node]:
    return [Node(f"id{place}", f"node{place}", number) for place, number in enumerate(gpus)]


def demand(
    tensor: int = 1, groups: int = 1, data: int = 1, engines: int = 1, of: int = 1, colocated: bool = False
) -> Demand:
    return Demand(tensor, groups, data, engines, of, colocated)


def refusal(cluster: list[Node], wanted: Demand) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(cluster, wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taken(seats: Seats, wanted: Demand) -> Counter[str]:
    """GPUs taken on each node; guests take none."""
    found: Counter[str] = Counter()
    for node in seats.groups:
        found[node.name] += wanted.tensor
    for node in () if wanted.colocated else seats.engines:
        found[node.name] += wanted.engine_tensor
    return found


@pytest.mark.parametrize(
    ("cluster", "wanted", "groups", "engines"),
    [
        # 3B on one GPU
        ([1], demand(colocated=True), [0], [0]),
        # 7B on one node: the original's hybrid engine, and apart
        ([8], demand(4, data=2, engines=8, colocated=True), [0, 0], [0] * 8),
        ([8], demand(4, engines=4), [0], [0] * 4),
        # 32B on six nodes (MM-EUREKA's): TP 8, PP 2, engines of 4 on the same GPUs; and apart
        ([8] * 6, demand(8, 2, 3, engines=12, of=4, colocated=True), [0, 1, 2, 3, 4, 5], sorted([*range(6)] * 2)),
        ([8] * 6, demand(8, 2, 2, engines=4, of=4), [0, 1, 2, 3], [4, 4, 5, 5]),
        # 72B on 128: TP 8, PP 8, an engine a node
        ([8] * 16, demand(8, 8, 2, engines=16, of=8, colocated=True), [*range(16)], [*range(16)]),
        ([8] * 16, demand(8, 8, 1, engines=8, of=8), [*range(8)], [*range(8, 16)]),
        # tensor-parallel groups smaller than an engine, which still has its node to itself
        ([8, 8], demand(2, data=8, engines=2, of=8, colocated=True), [0] * 4 + [1] * 4, [0, 1]),
        # blocks of four: the node of six holds one, the ranks behind it follow on the next
        ([6, 8], demand(2, data=4, engines=2, of=4, colocated=True), [0, 0, 1, 1], [0, 1]),
        # whoever is seated first may leave no hole: here the engine must be
        ([8, 4], demand(4, engines=1, of=8), [1], [0]),
    ],
)
def test_who_sits_where(cluster: list[int], wanted: Demand, groups: list[int], engines: list[int]) -> None:
    known = nodes(*cluster)
    seats = plan(known, wanted)
    assert [known.index(node) for node in seats.groups] == groups
    assert [known.index(node) for node in seats.engines] == engines
    assert all(count <= next(n.gpus for n in known if n.name == name) for name, count in taken(seats, wanted).items())


def test_too_few_gpus_are_told_with_what_would_fit() -> None:
    assert refusal(nodes(8), demand(4, data=2)) == (
        "this run needs 9 GPUs (8 trainer ranks, 1 engine × 1), the cluster has 8: placement=colocated, or parallel.data=1"
    )
    assert refusal(nodes(1), demand()) == (
        "this run needs 2 GPUs (1 trainer rank, 1 engine × 1), the cluster has 1: placement=colocated"
    )
    told = refusal(nodes(8), demand(4, engines=3, of=2))
    assert told.endswith("the cluster has 8: placement=colocated rollout.engines=2, or rollout.engines=2")
    told = refusal(nodes(8, 8), demand(8, 2, engines=2, of=8))
    assert told.endswith("the cluster has 16 on 2 nodes: placement=colocated")
    told = refusal(nodes(8), demand(8, 2, engines=0))
    assert told.endswith(
        "(16 trainer ranks), the cluster has 8: a smaller parallel.tensor or parallel.pipeline, or more GPUs"
    )


@pytest.mark.parametrize("gpus", [4, 6, 8])
def test_what_is_told_to_fit_fits(gpus: int) -> None:
    tried = 0
    for data, engines in product(range(1, 5), range(1, 9)):
        try:
            plan(nodes(gpus, gpus), demand(2, data=data, engines=engines, of=2))
        except ConfigError as error:
            for change in str(error).split(": ")[-1].split(", or "):
                keys = dict(word.split("=") for word in change.split())
                changed = demand(
                    2,
                    data=int(keys.get("parallel.data", data)),
                    engines=int(keys.get("rollout.engines", engines)),
                    of=2,
                    colocated="placement" in keys,
                )
                assert changed.divides or not changed.colocated
                plan(nodes(gpus, gpus), changed)
                tried += 1
    assert tried > 20


def test_a_group_or_an_engine_larger_than_a_node_is_told() -> None:
    told = refusal(nodes(8, 8), demand(16, engines=0))
    assert told.startswith("parallel.tensor=16 needs so many GPUs on one node, the largest has 8: at most 8")
    assert refusal(nodes(8, 8), demand(1, engines=1, of=16)).startswith("rollout.tensor=16 needs so many GPUs on one")
    assert "least common multiple" in refusal(nodes(8, 8), demand(4, data=3, engines=4, of=3, colocated=True))


def test_gpus_enough_but_not_on_one_node() -> None:
    told = refusal(nodes(6, 6), demand(4, data=3, engines=0))
    assert told == (
        "this run needs 12 GPUs (12 trainer ranks, each on one node with 6 at most), the cluster has 12 on 2 nodes: parallel.data=2"
    )


@pytest.mark.parametrize(
    ("count", "wanted", "groups", "engines"),
    [
        (1, demand(2, data=2, engines=2), [0, 0], [0, 0]),
        (2, demand(data=2), [0, 1], [0]),
        (2, demand(), [0], [1]),
        (3, demand(data=2, engines=2), [0, 1], [2, 0]),
        (2, demand(data=4, engines=2, colocated=True), [0, 0, 1, 1], [0, 0]),
        (2, demand(data=4, engines=4, colocated=True), [0, 0, 1, 1], [0, 0, 1, 1]),
    ],
)
def test_without_gpus_everybody_is_spread_over_the_nodes(
    count: int, wanted: Demand, groups: list[int], engines: list[int]
) -> None:
    known = nodes(*[0] * count)
    seats = plan(known, wanted)
    assert [known.index(node) for node in seats.groups] == groups
    assert [known.index(node) for node in seats.engines] == engines


def test_colocated_engines_must_divide_the_ranks(tmp_path: Path) -> None:
    given = {"model": {"path": str(tmp_path)}, "data": {"train": "x"}, "placement": "colocated"}
    config = make_config(given | {"parallel": {"data": 4}, "rollout": {"engines": 2, "tensor": 2}})
    assert Demand.of(config) == demand(data=4, engines=2, of=2, colocated=True)
    assert Demand.of(config, engines=False) == demand(data=4, engines=0, of=2)
    with pytest.raises(ConfigError, match=r"= 3 to divide the 4 trainer ranks .*: rollout.engines=1 or 2 or 4$"):
        make_config(given | {"parallel": {"data": 4}, "rollout": {"engines": 3}})
    with pytest.raises(ConfigError, match=r"rollout.tensor that divides 3$"):
        make_config(given | {"parallel": {"data": 3}, "rollout": {"tensor": 2}})
    with pytest.raises(ConfigError, match=r"async_steps=1 needs placement=split"):
        make_config(given | {"training": {"async_steps": 1}})
