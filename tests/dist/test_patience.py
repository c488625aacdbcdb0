"""A stretch in which one rank writes to a slow disk and the others, done at once, wait for it: `patient` collectives do not give up."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel, patient
from tests.helpers.ranks import RankError, run_ranks

USUAL, SLOW, LONG = timedelta(seconds=1), 2.5, timedelta(hours=6)


def limits(parallel: object) -> list[timedelta]:
    axes = (parallel.world, parallel.tensor, parallel.pipeline, parallel.data, parallel.context)
    return [axis.group._get_backend(torch.device("cpu")).options._timeout for axis in axes]


def waiting_for_a_writer(rank: int, is_patient: bool) -> list[list[timedelta]]:
    parallel = init_parallel(Layout(tensor=2), rank=rank)
    usual = limits(parallel)
    for axis in (parallel.world, parallel.tensor):
        dist.distributed_c10d._set_pg_timeout(USUAL, axis.group)
    before, during = limits(parallel), []
    with patient(parallel, LONG if is_patient else USUAL):
        during = limits(parallel)
        for axis in (parallel.tensor, parallel.world):
            if rank == 0:
                time.sleep(SLOW)
            dist.all_reduce(torch.ones(1), group=axis.group)
    after = limits(parallel)
    for axis, limit in zip((parallel.world, parallel.tensor), usual, strict=False):
        dist.distributed_c10d._set_pg_timeout(limit, axis.group)
    return [usual, before, during, after]


def test_a_rank_waits_for_one_that_writes_and_usual_limits_come_back() -> None:
    for usual, before, during, after in run_ranks(waiting_for_a_writer, 2, True):
        assert before[:2] == [USUAL, USUAL]
        assert set(during) == {LONG}
        assert after == before
        assert len(set(usual)) > 1  # Megatron's groups have another limit than the world: each gets its own back


def test_without_patience_it_gives_up() -> None:
    with pytest.raises(RankError, match=r"(?i)timed? ?out"):
        run_ranks(waiting_for_a_writer, 2, False)


def trainer_limits_while_it_exports(rank: int) -> list[timedelta]:
    """What TrainerRank.export has set when the trainer begins to write."""
    from eureka_megatron.train.actor import TrainerRank

    seen: list[timedelta] = []

    class Trainer:
        parallel = init_parallel(Layout(tensor=2), rank=rank)

        def export(self, *_: object) -> None:
            seen.extend(limits(self.parallel))

    actor = TrainerRank(None)
    actor.rank = rank
    actor.trainer = Trainer()
    actor.export(None, {})
    return seen


def test_exports_are_patient_in_every_group() -> None:
    for seen in run_ranks(trainer_limits_while_it_exports, 2):
        assert seen == [LONG] * 5
