"""One Ray actor a trainer rank, and the handle through which the driver speaks to all of them at once.

Every call goes to all ranks (they are collectives); answers come from the reporting rank: tensor rank 0, data rank 0, last stage, which
holds complete metrics. When a rank dies, its peers would wait in a collective until its timeout: the handle reports the death at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from eureka_megatron.checkpoint.store import CHECKPOINTS
from eureka_megatron.checkpoint.writer import SLOWEST_DISK, Report
from eureka_megatron.config import OptimizerSection, RunConfig
from eureka_megatron.data.batch import shaping_of
from eureka_megatron.errors import UserError, from_remote
from eureka_megatron.gpus import peak_of
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, read_hf_config
from eureka_megatron.models.qwen2_5_vl.operations import update_operations
from eureka_megatron.parallel.runtime import init_parallel, patient
from eureka_megatron.release.card import run_card
from eureka_megatron.sync import ipc_transfer, ray_transfer
from eureka_megatron.sync.ray_transfer import SyncReport
from eureka_megatron.tracking.memory import held_memory, memory_metrics
from eureka_megatron.train import sharing
from eureka_megatron.train.parcel import Rules, Share, shares, unwrap
from eureka_megatron.train.pulse import BEAT_SECONDS, Pulse, Watch, keep_log, last_words, log_file
from eureka_megatron.types import Batch, BeganWith, Sample

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the old name, which torch looks at first
ECHO_SECONDS = 5.0  # that a failure of one rank waits for the news that another has died


class DeadRank(UserError):
    """The process of a trainer rank has ended."""


class Place(NamedTuple):
    """Where a rank stands: which share of a batch is its, whether its answers are the complete ones, and what `shares` asks."""

    data_rank: int
    reports: bool
    rules: Rules
    tower_ranks: int
    device: str  # its name, e.g. NVIDIA H100 80GB HBM3, or CPU


class Seat(NamedTuple):
    """Where a process sits. Example: Seat(node="84ae35…", gpus=("3",), pid=4711)."""

    node: str  # Ray's id
    gpus: tuple[str, ...]  # that it has, or shares; none without GPUs
    pid: int


def own_seat() -> Seat:
    """Of this process, which must be an actor's."""
    context = ray.get_runtime_context()
    gpus = tuple(map(str, context.get_accelerator_ids()["GPU"]))
    if not gpus and "GPU" in ray.cluster_resources():  # a guest on the GPUs of others
        gpus = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    return Seat(context.get_node_id(), gpus, os.getpid())


class TrainerRank:
    """Runs inside the actor's process. Methods are collective over all ranks."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.rank = config, -1  # until `start` says it
        self._nccl: ray_transfer.NcclTransfer | None = None
        self._nccl_engines: list[ActorHandle] = []

    def address(self) -> str:
        """A free TCP address on this rank's node, for the rendezvous (asked of rank 0)."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def seat(self) -> Seat:
        """Where this process sits; asked before it has a rank."""
        return own_seat()

    def start(self, address: str, rank: int) -> dict[str, int]:
        """Join the others as this rank and load the weights. → the layout."""
        from eureka_megatron.train.checkpointing import TrainerCheckpoints
        from eureka_megatron.train.trainer import PolicyTrainer

        self.rank = rank
        keep_log(log_file(self.config.run.output, rank))
        Pulse(min(BEAT_SECONDS, self.config.training.stall_seconds / 4))
        layout, model, algorithm = self.config.layout, self.config.model, self.config.algorithm
        torch.manual_seed(self.config.run.seed)
        self.trainer = PolicyTrainer(
            model.path,
            init_parallel(layout, rank=self.rank, init_method=address),
            model,
            freeze=model.freeze,
            max_tokens_per_micro_batch=self.config.training.max_tokens_per_micro_batch,
            optimizer=self.config.optimizer,
            reference=(algorithm.reference or model.path) if algorithm.kl_coefficient > 0 else None,
        )
        self.trainer.share_prompts(self.config.training.share_prompts)
        limits = self.config.checkpoint
        self.checkpoints = TrainerCheckpoints(
            self.trainer,
            self.config.run.output / CHECKPOINTS,
            keep_last=limits.keep_last,
            keep_every=limits.keep_every,
        )
        return {
            "tp": layout.tensor,
            "pp": layout.pipeline,
            "vpp": layout.virtual_pipeline,
            "cp": layout.context,
            "dp": layout.data,
            "sequence_parallel": int(layout.sequence_parallel),
        }

    def place(self) -> Place:
        """Where this rank stands, for the driver."""
        parallel = self.trainer.parallel
        complete = parallel.last_stage and parallel.tensor.rank == 0 and parallel.data.rank == 0
        tower = self.trainer.frozen_tower
        on_gpu = parallel.device.type == "cuda"
        device = torch.cuda.get_device_name(parallel.device) if on_gpu else "CPU"
        return Place(parallel.data.rank, complete, self.trainer.rules, tower.ranks if tower else 0, device)

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of this rank, or of its trainer or checkpoints by a dotted name."""
        return attrgetter(name)(self)(*arguments)

    def train(self, share: Share) -> list[dict[str, float]]:
        """One rollout step's updates with the configured loss."""
        from eureka_megatron.train.step import Objective  # Megatron, which the driver does without

        algorithm = self.config.algorithm
        objective = Objective(
            algorithm.loss,
            self.config.loss_options,
            algorithm.compat,
            passes=self.config.training.passes,
            shaping=shaping_of(algorithm),
            temperature=self.config.rollout.temperature,
        )
        return self.trainer.learn(share, objective)

    def send_weights(self, engines: Sequence[ActorHandle], version: int, with_fingerprints: bool) -> SyncReport | None:
        """Stream the weights that learn into the engines; → a report on the sending rank."""
        report = self._send(engines, version, with_fingerprints)
        if not with_fingerprints:
            return report
        frozen = self.trainer.frozen_fingerprints()  # these did not travel, and must be equal all the same
        return None if report is None else replace(report, fingerprints=report.fingerprints | frozen)

    def _send(self, engines: Sequence[ActorHandle], version: int, with_fingerprints: bool) -> SyncReport | None:
        source, bucket_mib = self.trainer.weight_source(), self.config.sync.bucket_mib
        if self.config.placement == "colocated" and torch.cuda.is_available():
            return ipc_transfer.send_weights(
                source,
                engines,
                version=version,
                bucket_mib=bucket_mib,
                rank=self.rank,
                with_fingerprints=with_fingerprints,
            )
        if ray_transfer.default_backend() != "nccl":
            return ray_transfer.send_weights(
                source,
                engines,
                version=version,
                bucket_mib=bucket_mib,
                is_sender=self.rank == 0,
                with_fingerprints=with_fingerprints,
            )
        # Also after an engine was replaced: a new NCCL group.
        if self._nccl is None or self._nccl.broken or self._nccl_engines != list(engines):
            if self._nccl is not None:
                self._nccl.shutdown()
                self._nccl, self._nccl_engines = None, []
            workers = self.config.rollout.tensor
            self._nccl = ray_transfer.NcclTransfer(
                source, engines, rank=self.rank, bucket_mib=bucket_mib, workers=workers
            )
            self._nccl_engines = list(engines)
        return self._nccl.send(version, with_fingerprints=with_fingerprints)

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write a Hugging Face directory; collective, rank 0 writes."""
        with patient(self.trainer.parallel, SLOWEST_DISK):
            self.trainer.export(output, card)

    def save(self, step: int, texts: dict[str, str], state: dict[str, Any]) -> None:
        """See TrainerCheckpoints.save."""
        self.checkpoints.save(step, texts, **state)

    def memory(self) -> dict[str, float]:
        """See memory.held_memory."""
        return held_memory()

    def rest(self) -> None:
        """See PolicyTrainer.rest."""
        self.trainer.rest(move=self.config.training.offload)

    def save_ended(self) -> bool:
        """See TrainerCheckpoints.ended."""
        return self.checkpoints.ended


class TrainerGroup:
    """All trainer ranks. Needs `ray.init` to have happened.

    Args:
        config: `parallel` says how many ranks; each takes one GPU where the cluster has any.
        options: Ray's, of each actor, node by node; none: they start anywhere.
    """

    def __init__(self, config: RunConfig, options: Sequence[dict[str, Any]] | None = None) -> None:
        self.config = config
        # Of the last `train`: `timed/tflops`, 10¹² model operations a second and rank over all that they took, and `timed/mfu`, their share
        # of the device's bf16 peak, if that is known; under perf/ that share, the tokens and what the ranks hold of memory.
        self.utilisation: dict[str, float] = {}
        self._submitting = threading.Lock()
        world = config.parallel.world_size
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        common: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": gpus,
            "runtime_env": {
                "env_vars": environment_of_a_rank(
                    world, on_gpu=gpus > 0, exports_memory=config.placement == "colocated"
                )
            },
        }
        actor: Any = ray.remote(TrainerRank)
        # In the order of ranks once these are given out.
        self.ranks: list[ActorHandle] = [
            actor.options(**common, **own).remote(config) for own in options or [{}] * world
        ]
        self.seats: list[Seat] = []
        # Called before everything that needs the optimizer; colocated engines are put to sleep there.
        self.before_training: Callable[[], None] = lambda: None

    def take_seats(self) -> list[Seat]:
        """Give the ranks out by (node, GPU), nodes in the order of the options: neighbours are neighbours. → the seats, by rank."""
        if not self.seats:
            found = self._all("seat")
            nodes = list(dict.fromkeys(seat.node for seat in found))
            order = sorted(range(len(found)), key=lambda place: _by_node_and_gpu(found[place], nodes))
            self.ranks = [self.ranks[place] for place in order]
            self.seats = [found[place] for place in order]
        return self.seats

    def start(self) -> dict[str, int]:
        """Load the model on all ranks. → {"tp", "pp", "vpp", "cp", "dp", "sequence_parallel"}."""
        self.take_seats()
        address = str(ray.get(self.ranks[0].address.remote()))
        layout: dict[str, int] = self._each("start", [(address, rank) for rank in range(len(self.ranks))])[0]
        self.places: list[Place] = self._all("place")
        return layout

    def start_phase(self, section: OptimizerSection, total_updates: int) -> None:
        """Fresh optimizer and schedule with this horizon (optimizer steps)."""
        self.before_training()
        self._all("trainer.start_phase", section, total_updates)

    def train(self, batch: Batch) -> list[dict[str, float]]:
        """Metrics of each optimizer step of this rollout step."""
        self.before_training()
        first, start = self.places[0], time.perf_counter()  # a rank of the first stage, which has the tower
        parts = shares(batch, first.rules, first.tower_ranks)
        results: list[dict[str, float]] = self._shared("train", parts)
        self.utilisation = self._utilised(parts, (time.perf_counter() - start) / self.config.training.passes)
        return results

    def began_with(self, count: int) -> dict[int, BeganWith]:
        """Of the batch's first `count` samples, by place: what the weights thought of them that the last `train` began with."""
        return {place: found for part in self._all("trainer.began_with", count) for place, found in part.items()}

    def sft(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics of one supervised optimizer step, what `utilisation` has, and `time/train`."""
        self.before_training()
        start = time.perf_counter()
        parts = shares(Batch.of(samples), self.places[0].rules)
        metrics: dict[str, float] = self._shared("trainer.supervise", parts)
        seconds = time.perf_counter() - start
        return metrics | self._utilised(parts, seconds) | {"time/train": seconds}

    @property
    def unknown_device(self) -> str | None:
        """What to tell where no share of the peak can be given."""
        device = self.places[0].device
        if peak_of(device) is not None:
            return None
        return f"no peak is known of {device}: timed/tflops is logged, timed/mfu is not"

    @cached_property
    def _sizes(self) -> QwenVLConfig:
        return read_hf_config(self.config.model.path)

    def _utilised(self, parts: Sequence[Share], seconds: float) -> dict[str, float]:
        """Of `seconds` in which all parts' micro-batches went forward and backward once."""
        first = self.places[0]
        rows = [
            [samples[place] for place in row]
            for part in parts
            for samples in [unwrap(part.parcel)]
            for row in part.rows
        ]
        layout = first.rules.rows
        saved = [length for row in rows for length in sharing.saved(row, layout.padded)] if layout.share_prompts else []
        operations = update_operations(self._sizes, rows, saved, frozen_tower=first.tower_ranks > 0)
        rate = operations / seconds / len(self.ranks) / 1e12
        peak = peak_of(first.device)
        tokens = sum(len(sample) for row in rows for sample in row)
        found = {"timed/tflops": rate, "perf/tokens_per_second_per_rank": tokens / seconds / len(self.ranks)}
        found["perf/tokens_saved"] = sum(saved) / max(tokens, 1)
        if peak is not None:
            found |= {"timed/mfu": rate / peak, "perf/mfu": rate / peak}
        return found | memory_metrics("trainer", self._all("memory"))

    def _shared(self, method: str, parts: Sequence[Share]) -> Any:
        """The reporting rank's answer. Ranks of one data-parallel rank read the same object of Ray's store."""
        objects = [ray.put(share) for share in parts]
        answers = self._each(method, [(objects[place.data_rank],) for place in self.places])
        return next(answer for answer, place in zip(answers, self.places, strict=True) if place.reports)

    def send_weights(self, engines: Sequence[ActorHandle], version: int, with_fingerprints: bool = False) -> SyncReport:
        """Send the present weights to the engines as `version`; again to those that live, when one that died broke the update off."""
        alive = list(range(len(engines)))
        while True:
            handles = [engines[index] for index in alive]
            report: SyncReport = self._all("send_weights", handles, version, with_fingerprints)[0]
            alive = [index for place, index in enumerate(alive) if place not in report.lost]
            if not report.broken:
                return replace(report, lost=tuple(sorted({*range(len(engines))} - {*alive})))

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write the present weights as a Hugging Face directory."""
        self._all("export", output, card)

    def save(self, step: int, texts: dict[str, str], state: dict[str, Any]) -> None:
        """Begin to write a training checkpoint; returns when a copy of everything is in host memory. See TrainerCheckpoints.save."""
        self._all("save", step, ray.put(texts), ray.put(state))

    def save_ended(self) -> bool:
        """Whether `wait_for_save` has something to tell and need not wait."""
        return bool(ray.get(self.ranks[0].save_ended.remote()))

    def wait_for_save(self) -> Report | None:
        """How the last save ended, once; None when there is none to wait for."""
        return self._all("checkpoints.wait")[0]

    def load(self, directory: Path) -> dict[str, Any]:
        """Fill weights, optimizer and schedule from a training checkpoint; after `start_phase`. → its state.json"""
        self.before_training()
        return self._all("checkpoints.load", directory)[0]

    def rest(self) -> None:
        """Leave the GPUs' memory to the engines (`training.offload`), see train.offload."""
        self._all("rest")

    def resume(self) -> None:
        """Make ready for updates after `rest`."""
        self._all("trainer.resume")

    def close(self) -> None:
        """End the rank processes."""
        for rank in self.ranks:
            ray.kill(rank)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._each(method, [arguments] * len(self.ranks))

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call the method on every rank with its arguments. → the answers, by rank; the first failure is raised, see `_cause`."""
        with self._submitting:  # all ranks get the calls of several threads in the same order: they are collectives
            calls: list[ray.ObjectRef] = [
                rank.call.remote(method, *own) for rank, own in zip(self.ranks, arguments, strict=True)
            ]
        waiting, watch = calls, Watch(self.ranks, self.config.training.stall_seconds)
        while waiting:  # after a failure the others may wait for ever, in a collective that the failed rank never joins
            done, waiting = ray.wait(waiting, num_returns=1, timeout=BEAT_SECONDS)
            if not done:
                watch.look(map(calls.index, waiting), method)
                continue
            if failure := self._failure(calls, done[0], method):
                raise self._cause(failure, calls, waiting, method)
        return ray.get(calls)

    def _failure(self, calls: Sequence[ray.ObjectRef], call: ray.ObjectRef, method: str) -> Exception | None:
        """What a call that has ended died of, if it did."""
        rank = calls.index(call)
        try:
            ray.get(call)
        except RayTaskError as error:
            return from_remote(f"trainer rank {rank}", error)
        except RayActorError:
            word = last_words(log_file(self.config.run.output, rank))
            return DeadRank(f"trainer rank {rank} died during {method!r}: {word}")
        return None

    def _cause(
        self, failure: Exception, calls: Sequence[ray.ObjectRef], waiting: Sequence[ray.ObjectRef], method: str
    ) -> Exception:
        """The death of a rank breaks the collectives of the others, and often they tell of it sooner than Ray: the death is the cause."""
        until = time.monotonic() + ECHO_SECONDS
        while waiting and not isinstance(failure, UserError) and (left := until - time.monotonic()) > 0:
            done, waiting = ray.wait(list(waiting), num_returns=1, timeout=left)
            later = self._failure(calls, done[0], method) if done else None
            failure = later if isinstance(later, DeadRank) else failure
        return failure


def _by_node_and_gpu(seat: Seat, nodes: Sequence[str]) -> Any:
    return nodes.index(seat.node), [(len(gpu), gpu) for gpu in seat.gpus], seat.pid  # "10" after "9"


def environment_of_a_rank(world_size: int, *, on_gpu: bool, exports_memory: bool = False) -> dict[str, str]:
    """Variables of the trainer ranks' processes. On GPUs what this process has set counts, on a cluster too.

    exports_memory: by CUDA IPC, to colocated engines; handles of expandable segments are such as many containers do not let pass.

    Of the trainers only: vLLM's sleep mode and expandable segments exclude each other.
    """
    found = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size))}
    if on_gpu:
        # One queue to the GPU: a collective that was started before a matrix product also runs before it (Megatron relies on that).
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # Rows of changing lengths would break fixed segments of memory into pieces too small to use.
        own = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
        found |= own or ({} if exports_memory else {ALLOCATOR[0]: "expandable_segments:True"})
    return found


def model_card(config: RunConfig, scores: dict[str, float] | None = None, stage: str = "train") -> dict[str, Any]:
    """What a release says of the run it comes from, `eureka train` or `eureka sft`."""
    return run_card(config.model_dump(mode="json"), scores, stage)
