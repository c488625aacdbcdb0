"""The trainer ranks' processes as Ray starts them: their environment, their memory, the object store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.config import make_config
from eureka_megatron.data.batch import shaping_of
from eureka_megatron.errors import UserError
from eureka_megatron.train.parcel import Parcel, unwrap, wrap
from eureka_megatron.train.pulse import last_words, log_file
from eureka_megatron.types import Batch
from eureka_megatron.verify.samples import made_up_samples
from tests.helpers.engines import run_config
from tests.helpers.ranks import run_ranks

EXPANDABLE = "expandable_segments:True"


class Idle:
    """In place of an engine, which would load vLLM first: the process is what is looked at."""

    def __init__(self, *_: Any) -> None:
        pass


def environment(_: Any) -> dict[str, str]:
    return dict(os.environ)


def memory_mib() -> tuple[float, float]:
    """(own, shared with others or files) of this process, counted page by page: the sums in /proc/self/status lag behind by MiB on many cores."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    size = {line[0]: int(line[1]) / 1024 for line in lines if line[0] in {"Rss:", "Anonymous:"}}
    return size["Anonymous:"], size["Rss:"] - size["Anonymous:"]


def own_memory_of_a_rank(_: Any, parcel: Parcel) -> tuple[float, float]:
    """MiB (own, shared) that the rank's process has more after it has read every patch."""
    before = memory_mib()
    total = sum(float(picture.patches_PD.sum()) for sample in unwrap(parcel) for picture in sample.pictures)
    assert total != 0
    own, shared = memory_mib()
    return own - before[0], shared - before[1]


@pytest.fixture(scope="module")
def ray_with_gpus() -> Any:
    """Ray that believes to have three GPUs."""
    import ray

    from tests.helpers.engines import private_ray

    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            patch.delenv(name, raising=False)
        with private_ray(gpus=3):
            yield ray


def test_trainers_get_their_gpu_settings_and_engines_do_not(
    ray_with_gpus: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eureka_megatron.rollout.pool import RolloutPool
    from eureka_megatron.train.actor import TrainerGroup

    ray, config = ray_with_gpus, run_config(tiny_dir, engines=1)
    with ExitStack() as stack:

        def start(group: Any, end: Callable[[], None]) -> Any:
            stack.callback(end)
            return group.__ray_call__.remote(environment)

        usual = TrainerGroup(config)
        calls = [start(usual.ranks[0], usual.close)]
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
        own = TrainerGroup(config)
        calls.append(start(own.ranks[0], own.close))
        pool = RolloutPool(config, engine_class=Idle)
        calls.append(start(pool.actors[0], pool.shutdown))
        ours, theirs, engine = ray.get(calls)  # the processes start side by side
        assert ours["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
        assert ours["PYTORCH_ALLOC_CONF"] == EXPANDABLE
        assert theirs["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
        assert theirs["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
        assert "PYTORCH_ALLOC_CONF" not in theirs
        assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & engine.keys()


def test_nodes_that_do_not_join_are_told(ray_with_gpus: Any) -> None:
    from eureka_megatron.run.cluster import wait_for_nodes

    wait_for_nodes(1, seconds=0)
    with pytest.raises(UserError, match=r"1 of EUREKA_RAY_NODES=2 nodes have joined Ray within EUREKA_RAY_SECONDS=0: "):
        wait_for_nodes(2, seconds=0)


def test_a_rank_maps_a_batchs_patches_instead_of_copying_them(ray_with_gpus: Any, tiny_dir: Path) -> None:
    ray = ray_with_gpus
    samples = made_up_samples(tiny_dir, pictures=[((40, 60),)])
    patches = samples[0].pictures[0].patches_PD.nbytes / 2**20
    actor = ray.remote(num_cpus=0)(Idle).remote()
    ray.get(actor.__ray_call__.remote(own_memory_of_a_rank, wrap(made_up_samples(tiny_dir))))  # imports are done
    own, shared = ray.get(actor.__ray_call__.remote(own_memory_of_a_rank, ray.put(wrap(samples))))
    print(f"patches {patches:.1f} MiB; own memory {own:.1f}, shared {shared:.1f}")
    assert shared >= 0.95 * patches  # measured 1.00
    assert own <= 0.25 * patches  # measured 0.02; 1.0 and more as torch tensors


STORE = """
import sys
from contextlib import ExitStack
from dataclasses import replace
import ray
from eureka_megatron.run.cluster import start_ray
with ExitStack() as stack:
    start_ray(stack)
    print("store", int(ray.cluster_resources()["object_store_memory"]))
"""


def test_the_object_store_is_a_share_of_the_machine_or_what_rays_environment_says() -> None:
    shared = os.statvfs("/dev/shm")
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), shared.f_blocks * shared.f_frsize)
    limit = 300_000_000
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STORE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | extra
        )
        for extra in ({}, {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(limit)})
    ]
    found = []
    for process in started:
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        found.append(int(output.split()[-1]))
    print(f"{found[0] / 2**30:.2f} GiB of {memory / 2**30:.1f}")
    assert 512 << 20 < found[0] < 0.5 * memory  # Ray takes 30 % of what is free at the start
    assert found[1] == pytest.approx(limit, rel=0.01)


def plain_updates(rank: int, directory: str, config: Any, batch: Batch) -> list[dict[str, float]]:
    """The same in ranks without Ray, each of which has the whole batch."""
    from eureka_megatron.parallel.runtime import init_parallel
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(rank=rank, world_size=2)
    trainer = PolicyTrainer(directory, parallel, freeze=config.model.freeze)
    trainer.start_phase(config.optimizer, 4)
    return trainer.train(batch, config.algorithm.loss, {}, shaping=shaping_of(config.algorithm))


@pytest.fixture(scope="module")
def two_ranks(ray_with_gpus: Any, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two data-parallel ranks, which a call can spoil: each runs its function before they meet in a collective."""
    from eureka_megatron.train import actor

    class Spoilt(actor.TrainerRank):  # local, so that Ray pickles it by value
        def pid(self) -> int:
            return os.getpid()

        def call(self, name: str, *arguments: Any) -> Any:
            if name == "spoil":
                if self.rank < len(arguments):
                    arguments[self.rank]()
                torch.distributed.all_reduce(torch.ones(1))
            return super().call(name, *arguments) if name != "spoil" else None

    sections = {
        "run": {"output": str(tmp_path_factory.mktemp("ranks"))},
        "parallel": {"data": 2},
        "training": {"prompts_per_step": 4, "responses_per_update": 8, "stall_seconds": 4},
    }
    config = make_config({**run_config(tiny_dir).model_dump(mode="json"), **sections})
    config = config.model_copy(update={"model": config.model.model_copy(update={"freeze": ("vision", "merger")})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "TrainerRank", Spoilt)
        group = actor.TrainerGroup(config)
    try:
        assert group.start()["dp"] == 2
        yield group
    finally:
        group.close()


def test_ranks_that_get_their_share_make_the_updates_of_ranks_that_have_everything(
    two_ranks: Any, tiny_dir: Path
) -> None:
    prompts = made_up_samples(tiny_dir, pictures=(((3, 3),), ((2, 5), (1, 1)), ()))
    samples = [replace(sample, advantages_S=sample.mask_S * (n - 1)) for n in range(3) for sample in prompts]
    batch = Batch(tuple(samples), ((0, 2, 4, 6, 8), (1, 3, 5, 7)))
    config = two_ranks.config
    two_ranks.start_phase(config.optimizer, 4)
    found = two_ranks.train(batch)
    assert 0 < two_ranks.utilisation["perf/tokens_saved"] < 1  # three responses to each prompt
    assert found == run_ranks(plain_updates, 2, str(tiny_dir), config, batch)[0]


def test_a_rank_that_stands_still_is_named_and_what_the_others_wait_in(two_ranks: Any) -> None:
    pids: list[int] = two_ranks._all("pid")
    try:
        expected = r"rank 1 stands still: no sign of life for 4 s \(training\.stall_seconds\) during 'spoil'; rank 0 waits in all_reduce"
        with pytest.raises(UserError, match=expected):
            two_ranks._all("spoil", bool, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    finally:
        os.kill(pids[1], signal.SIGCONT)


def test_a_rank_that_dies_ends_the_call_with_its_last_word(two_ranks: Any) -> None:
    """It is the end of these ranks. The other rank, whose collective breaks, says so before Ray tells of the death."""

    def broken() -> None:
        raise RuntimeError("Connection reset by peer")

    def crash() -> None:
        time.sleep(1)
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
        print("(a line about something else)", flush=True)
        os._exit(3)

    with pytest.raises(UserError, match=r"rank 1 died during 'spoil': CUDA error: an illegal.*logs/rank_0001\.log"):
        two_ranks._all("spoil", broken, crash)
    assert (two_ranks.config.run.output / "logs" / "rank_0000.log").read_text().startswith("--- ")


def test_the_last_word_of_a_rank_is_an_error_of_its_last_start(tmp_path: Path) -> None:
    log = log_file(tmp_path, 3)
    assert last_words(log) == f"its log is on its node: {log}"
    log.parent.mkdir()
    log.write_text(
        "--- 2026-11-27 01:00:00 gpu07 process 12\nValueError: of the first start\n--- 2026-11-27 02:00:00 gpu07 process 40\n"
    )
    assert last_words(log) == f"no error in its log ({log}): look for an out-of-memory kill on its node"
    with log.open("a") as file:
        file.write(
            "x.py:3: UserWarning: errors are ignored\nterminate called\n  what():  CUDA error: unspecified launch failure\nbye\n"
        )
    assert last_words(log) == f"what():  CUDA error: unspecified launch failure ({log})"
