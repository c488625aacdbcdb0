"""One Ray actor a trainer rank, and the handle through which the driver speaks to all of them at once.

Every call goes to all ranks (they are collectives); answers come from the reporting rank: tensor rank 0, data rank 0, last stage, which
holds complete metrics. When a rank dies, its peers would wait in a collective until its timeout: the handle reports the death at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from eureka_megatron.checkpoint.store import CHECKPOINTS
from eureka_megatron.checkpoint.writer import SLOWEST_DISK, Report
from eureka_megatron.config import OptimizerSection, RunConfig
from eureka_megatron.data.batch import shaping_of
from eureka_megatron.errors import UserError, from_remote
from eureka_megatron.parallel.runtime import init_parallel, patient
from eureka_megatron.release.card import run_card
from eureka_megatron.train.parcel import Parcel, unwrap, wrap
from eureka_megatron.types import Batch, Sample

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the old name, which torch looks at first


class TrainerRank:
    """Runs inside the actor's process. Methods are collective over all ranks."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self._nccl: Any = None
        self._nccl_engines: list[Any] = []

    def address(self) -> str:
        """A free TCP address on this rank's node, for the rendezvous (asked of rank 0)."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def start(self, address: str) -> dict[str, int]:
        """Join the others and load the weights. → the layout."""
        from eureka_megatron.train.checkpointing import TrainerCheckpoints
        from eureka_megatron.train.trainer import PolicyTrainer

        sizes, model, algorithm = self.config.parallel, self.config.model, self.config.algorithm
        torch.manual_seed(self.config.run.seed)
        parallel = init_parallel(
            **sizes.of_a_rank(),
            rank=self.rank,
            world_size=sizes.world_size,
            init_method=address,
        )
        self.trainer = PolicyTrainer(
            model.path,
            parallel,
            dtype=model.dtype,
            backend=model.backend,
            freeze=model.freeze,
            recompute=model.recompute,
            fp8=model.fp8,
            fp8_recipe=model.fp8_recipe,
            vision_parallel=model.vision_parallel,
            max_tokens_per_micro_batch=self.config.training.max_tokens_per_micro_batch,
            optimizer=self.config.optimizer,
            reference=(algorithm.reference or model.path) if algorithm.kl_coefficient > 0 else None,
        )
        limits = self.config.checkpoint
        self.checkpoints = TrainerCheckpoints(
            self.trainer,
            self.config.run.output / CHECKPOINTS,
            keep_last=limits.keep_last,
            keep_every=limits.keep_every,
        )
        return {
            "tp": parallel.tensor.size,
            "pp": parallel.pipeline.size,
            "vpp": parallel.virtual_pipeline,
            "cp": parallel.context.size,
            "dp": parallel.data.size,
            "sequence_parallel": int(parallel.sequence_parallel),
        }

    def reports(self) -> bool:
        """Whether this rank's answers are the complete ones."""
        parallel = self.trainer.parallel
        return parallel.last_stage and parallel.tensor.rank == 0 and parallel.data.rank == 0

    def start_phase(self, section: OptimizerSection, total_updates: int) -> None:
        """See PolicyTrainer.start_phase."""
        self.trainer.start_phase(section, total_updates)

    def train(self, batch: Batch, parcel: Parcel) -> list[dict[str, float]]:
        """One rollout step's updates with the configured loss. The batch's samples are in the parcel."""
        batch = replace(batch, samples=tuple(unwrap(parcel)))
        algorithm = self.config.algorithm
        return self.trainer.train(
            batch,
            algorithm.loss,
            algorithm.all_loss_options(),
            algorithm.compat,
            self.config.training.passes,
            shaping_of(algorithm),
            self.config.rollout.temperature,
        )

    def sft(self, parcel: Parcel) -> dict[str, float]:
        """See PolicyTrainer.sft."""
        return self.trainer.sft(unwrap(parcel))

    def logprobs(self, parcel: Parcel, temperature: float) -> list[Any] | None:
        """See PolicyTrainer.logprobs; numpy, on the reporting rank."""
        values = self.trainer.logprobs(unwrap(parcel), temperature)
        return None if values is None else [value.float().cpu().numpy() for value in values]

    def send_weights(self, engines: Sequence[Any], version: int, with_fingerprints: bool) -> Any:
        """Stream the weights that learn into the engines; → a SyncReport on the sending rank."""
        report = self._send(engines, version, with_fingerprints)
        if not with_fingerprints:
            return report
        frozen = self.trainer.frozen_fingerprints()  # these did not travel, and must be equal all the same
        return None if report is None else replace(report, fingerprints=report.fingerprints | frozen)

    def _send(self, engines: Sequence[Any], version: int, with_fingerprints: bool) -> Any:
        from eureka_megatron.sync import ray_transfer

        source, bucket_mib = self.trainer.weight_source(), self.config.sync.bucket_mib
        if ray_transfer.default_backend() != "nccl":
            return ray_transfer.send_weights(
                source,
                engines,
                version=version,
                bucket_mib=bucket_mib,
                is_sender=self.rank == 0,
                with_fingerprints=with_fingerprints,
            )
        if self._nccl_engines != list(engines):  # the first time, and after an engine was replaced: a new NCCL group
            if self._nccl is not None:
                self._nccl.shutdown()
                self._nccl, self._nccl_engines = None, []
            self._nccl = ray_transfer.NcclTransfer(source, engines, rank=self.rank, bucket_mib=bucket_mib)
            self._nccl_engines = list(engines)
        return self._nccl.send(version, with_fingerprints=with_fingerprints)

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write a Hugging Face directory; collective, rank 0 writes."""
        with patient(self.trainer.parallel, SLOWEST_DISK):
            self.trainer.export(output, card)

    def save(self, step: int, texts: dict[str, str], state: dict[str, Any]) -> None:
        """See TrainerCheckpoints.save."""
        self.checkpoints.save(step, texts, **state)

    def save_ended(self) -> bool:
        """See TrainerCheckpoints.ended."""
        return self.checkpoints.ended

    def wait_for_save(self) -> Report | None:
        """See TrainerCheckpoints.wait."""
        return self.checkpoints.wait()

    def load(self, directory: Path) -> dict[str, Any]:
        """See TrainerCheckpoints.load."""
        return self.checkpoints.load(directory)


class TrainerGroup:
    """All trainer ranks. Needs `ray.init` to have happened.

    Args:
        config: `parallel` says how many ranks; each takes one GPU where the cluster has any.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        world = config.parallel.world_size
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        actor = ray.remote(TrainerRank).options(
            num_cpus=0, num_gpus=gpus, runtime_env={"env_vars": environment_of_a_rank(world, on_gpu=gpus > 0)}
        )
        self.ranks = [actor.remote(config, rank) for rank in range(world)]
        self.reporter = 0

    def start(self) -> dict[str, int]:
        """Load the model on all ranks. → {"tp", "pp", "vpp", "cp", "dp", "sequence_parallel"}."""
        address = ray.get(self.ranks[0].address.remote())
        layout = self._all("start", address)[0]
        self.reporter = self._all("reports").index(True)
        return layout

    def start_phase(self, section: OptimizerSection, total_updates: int) -> None:
        """Fresh optimizer and schedule with this horizon (optimizer steps)."""
        self._all("start_phase", section, total_updates)

    def train(self, batch: Batch) -> list[dict[str, float]]:
        """Metrics of each optimizer step of this rollout step."""
        parcel = ray.put(wrap(batch.samples))
        return self._all("train", replace(batch, samples=()), parcel)[self.reporter]

    def sft(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics of one supervised optimizer step."""
        return self._all("sft", ray.put(wrap(samples)))[self.reporter]

    def logprobs(self, samples: Sequence[Sample], temperature: float = 1.0) -> list[Any]:
        """float32 [S] each: log-probability of every token of the samples, index 0 is 0."""
        return self._all("logprobs", ray.put(wrap(samples)), temperature)[self.reporter]

    def send_weights(self, engines: Sequence[Any], version: int, with_fingerprints: bool = False) -> Any:
        """Send the present weights to the engines as `version`. → SyncReport."""
        return self._all("send_weights", list(engines), version, with_fingerprints)[0]

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write the present weights as a Hugging Face directory."""
        self._all("export", output, card)

    def save(self, step: int, texts: dict[str, str], state: dict[str, Any]) -> None:
        """Begin to write a training checkpoint; returns when a copy of everything is in host memory. See TrainerCheckpoints.save."""
        self._all("save", step, ray.put(texts), ray.put(state))

    def save_ended(self) -> bool:
        """Whether `wait_for_save` has something to tell and need not wait."""
        return ray.get(self.ranks[0].save_ended.remote())

    def wait_for_save(self) -> Report | None:
        """How the last save ended, once; None when there is none to wait for."""
        return self._all("wait_for_save")[0]

    def load(self, directory: Path) -> dict[str, Any]:
        """Fill weights, optimizer and schedule from a training checkpoint; after `start_phase`. → its state.json"""
        return self._all("load", directory)[0]

    def close(self) -> None:
        """End the rank processes."""
        for rank in self.ranks:
            ray.kill(rank)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        waiting = list(calls)
        while waiting:  # whoever fails first speaks: the others may hang in a collective that it will never join
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done[0])
            except RayTaskError as error:
                raise from_remote(f"trainer rank {calls.index(done[0])}", error) from None
            except RayActorError as error:
                rank = calls.index(done[0])
                raise UserError(
                    f"trainer rank {rank} died during {method!r} ({str(error).splitlines()[0]}); "
                    "look for an out-of-memory kill in its log"
                ) from error
        return ray.get(calls)


def environment_of_a_rank(world_size: int, *, on_gpu: bool) -> dict[str, str]:
    """Variables of the trainer ranks' processes. On GPUs what this process has set counts, on a cluster too.

    Of the trainers only: vLLM's sleep mode and expandable segments exclude each other.
    """
    found = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size))}
    if on_gpu:
        # One queue to the GPU: a collective that was started before a matrix product also runs before it (Megatron relies on that).
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # Rows of changing lengths would break fixed segments of memory into pieces too small to use.
        own = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
        found |= own or {ALLOCATOR[0]: "expandable_segments:True"}
    return found


def model_card(config: RunConfig, scores: dict[str, float] | None = None, stage: str = "train") -> dict[str, Any]:
    """What a release says of the run it comes from, `eureka train` or `eureka sft`."""
    return run_card(config.model_dump(mode="json"), scores, stage)
