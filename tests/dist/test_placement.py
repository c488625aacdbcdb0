"""Seats as Ray gives them, on two raylets that believe to have two GPUs each. No rank loads a model here."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import ConfigError, UserError
from tests.helpers.engines import run_config

STORE = 80 << 20


class Idle:
    """In place of an engine, which would load vLLM first: its seat is what is looked at."""

    def __init__(self, *_: Any) -> None:
        pass


def visible(_: Any) -> tuple[str | None, str | None]:
    """What an engine's process sees of the GPUs, and how torch is to divide their memory."""
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray._private import utils
    from ray.cluster_utils import Cluster

    with (
        tempfile.TemporaryDirectory(prefix="eureka-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Ray would note the address where every other run on this machine looks for one.
        patch.setattr(utils, "get_ray_address_file", lambda _: f"{folder}/address")
        common = {"num_cpus": 1, "object_store_memory": STORE}
        head = {**common, "num_gpus": 2, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**common, num_gpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def config(folder: Path, sections: dict[str, Any], **rollout: Any) -> RunConfig:
    return run_config(folder / "model", {"run": {"output": str(folder)}, **sections}, **rollout)


def placed(
    wanted: RunConfig,
) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]], list[tuple[str | None, str | None]]]:
    """(node, GPUs, rank) of every rank and of every engine as topology.json has them, and `visible` of each engine."""
    import ray

    from eureka_megatron.rollout.pool import RolloutPool
    from eureka_megatron.run.placement import FILE, Placement
    from eureka_megatron.train.actor import TrainerGroup

    with ExitStack() as stack:
        placement = Placement(wanted)
        stack.callback(placement.close)
        trainer = TrainerGroup(wanted, placement.rank_options())
        stack.callback(trainer.close)
        pool = RolloutPool(wanted, placement.engine_options(trainer.take_seats()), engine_class=Idle)  # type: ignore[arg-type]
        stack.callback(pool.shutdown)
        placement.tell(trainer.seats, pool.actors)
        seen = ray.get([actor.__ray_call__.remote(visible) for actor in pool.actors])

        before = json.loads((wanted.run.output / FILE).read_text())
        ray.kill(pool.actors[0])  # its replacement sits where it sat
        pool._actors[0] = pool._actor_classes[0].remote()
        placement.replaced(0, pool.actors[0])
        found = json.loads((wanted.run.output / FILE).read_text())
    changed = [line for line in found["seats"] if line not in before["seats"]]
    assert [(line["role"], line["rank"]) for line in changed] == [("engine", 0)]
    assert found["placement"] == wanted.placement
    lines = [(line["role"], (line["node"][-2:], ",".join(line["gpus"]), line["rank"])) for line in found["seats"]]
    ranks, engines = ([line for role, line in lines if role == wanted_role] for wanted_role in ("trainer", "engine"))
    return ranks, engines, seen


def test_a_group_and_an_engine_keep_to_a_node(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks, engines, seen = placed(config(tmp_path, {"parallel": {"tensor": 2}}, engines=1, tensor=2))
    assert ranks == [("/0", "0", 0), ("/0", "1", 1)]
    assert engines == [("/1", "0,1", 0)]
    assert seen == [("0,1", None)]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["node", "GPU", "role", "rank"]
    assert [line[1:] for line in table[1:]] == [["0,1", "trainer", "0–1"], ["0,1", "engine", "0"]]


def test_colocated_engines_see_the_gpus_of_their_ranks(cluster: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sections = {"parallel": {"tensor": 2, "data": 2}, "placement": "colocated"}
    ranks, engines, seen = placed(config(tmp_path, sections, engines=2, tensor=2))
    assert ranks == [("/0", "0", 0), ("/0", "1", 1), ("/1", "0", 2), ("/1", "1", 3)]
    assert engines == [("/0", "0,1", 0), ("/1", "0,1", 1)]
    assert seen == [("0,1", "expandable_segments:False")] * 2


def test_too_few_gpus_and_taken_ones_are_told_before_anything_starts(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eureka_megatron.run import placement

    with pytest.raises(
        ConfigError, match=r"needs 5 GPUs \(4 trainer ranks, 1 engine × 1\), the cluster has 4 on 2 nodes"
    ):
        placement.Placement(config(tmp_path, {"parallel": {"data": 4}}))
    all_of_it = config(tmp_path, {"parallel": {"data": 4}, "placement": "colocated"}, engines=4)
    first = placement.Placement(all_of_it)
    try:
        monkeypatch.setattr(placement, "RESERVE_SECONDS", 0.5)
        with pytest.raises(UserError, match="needs 4 of the cluster's 4 GPUs, but others have them: 0 are free"):
            placement.Placement(all_of_it)
    finally:
        first.close()


def test_without_gpus_nodes_are_named_by_affinity(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from eureka_megatron.run import placement
    from eureka_megatron.run.seats import Node

    known = [Node(node.id, node.name, 0) for node in placement.cluster_nodes()]
    monkeypatch.setattr(placement, "cluster_nodes", lambda: known)
    seats = placement.Placement(config(tmp_path, {}, engines=1))
    options = [*seats.rank_options(), *seats.engine_options()]
    actors = [ray.remote(Idle).options(num_cpus=0, **own).remote() for own in options]
    found = ray.get([actor.__ray_call__.remote(node_id) for actor in actors])
    assert found == [known[0].id, known[1].id]


def node_id(_: Any) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()
