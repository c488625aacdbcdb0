"""The policy on this trainer rank: model chunks, optimizer, and what one rollout step asks of them.

Knows nothing of Ray or vLLM: `actor` puts it into a process, tests run it in plain spawned ranks.

Shapes: T rows of a packed micro-batch, S tokens of one sample.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eureka_megatron.config import OptimizerSection
from eureka_megatron.errors import UserError
from eureka_megatron.layout import Execution
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel, build_model
from eureka_megatron.models.qwen2_5_vl.transformer_config import fp8_rows
from eureka_megatron.parallel.cpu import cuda_type_names
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.release.live import export_hf
from eureka_megatron.rl.losses import Metrics, reduce_metrics
from eureka_megatron.rl.shaping import credit_tokens
from eureka_megatron.sync.check import Fingerprint, fingerprint
from eureka_megatron.sync.source import MegatronWeightSource, TensorMeta
from eureka_megatron.train import packing, step
from eureka_megatron.train.freeze import freeze as freeze_parameters
from eureka_megatron.train.freeze import frozen_tower
from eureka_megatron.train.mismatch import mismatch
from eureka_megatron.train.offload import Offload
from eureka_megatron.train.optimizer import learning_rate, make_optimizer, wrap
from eureka_megatron.train.parcel import Rules, Share, shares, unwrap, unwrap_pictures
from eureka_megatron.train.reference import ReferenceWeights
from eureka_megatron.types import Batch, BeganWith, MicroBatch, Sample
from eureka_megatron.weights import iter_hf_weights, load_hf
from eureka_megatron.weights.online import table_of
from eureka_megatron.weights.table import tensors_of, unsent


class PolicyTrainer:
    """One rank's share of the policy. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        model_path: Path | str,
        parallel: Parallel,
        execution: Execution = Execution(),
        *,
        freeze: Iterable[str] = (),
        max_tokens_per_micro_batch: int = 16384,
        optimizer: OptimizerSection | None = None,
        reference: Path | str | None = None,
    ) -> None:
        self.parallel = parallel
        self.model_path = Path(model_path)
        self.max_tokens = max_tokens_per_micro_batch
        self.hf_config = read_hf_config(model_path)
        layout = parallel.layout
        self.row_layout = packing.row_layout(
            parallel, layout.vision_parallel, fp8_rows(execution, layout), share_prompts=True
        )
        chunks = build_model(self.hf_config, parallel, execution)
        self.frozen = freeze_parameters(chunks, tuple(freeze))
        # Whoever asks for bf16 gets it, from fp32 checkpoints too; the distributed optimizer's masters start from what was loaded.
        narrow = execution.dtype == "bfloat16"
        self.reference: ReferenceWeights | None = None
        if reference is not None:
            same = Path(reference).resolve() == self.model_path.resolve()
            self.reference = ReferenceWeights(
                chunks, Path(reference), parallel, allow_narrowing=narrow, same_checkpoint=same
            )
        self._load(chunks, allow_narrowing=narrow)
        merge = self.hf_config.vision_config.spatial_merge_size
        # None on stages without a tower and when the tower learns.
        self.frozen_tower = frozen_tower(chunks, parallel, max_tokens_per_micro_batch * merge**2)
        self.chunks = wrap(chunks, optimizer or OptimizerSection())
        self.optimizer: Any = None
        self._offload = Offload(parallel.device)
        self._frozen_fingerprints: dict[str, Fingerprint] | None = None
        # Of the last `learn`: its micro-batches, and where its samples stand in the batch.
        self._learned: tuple[list[MicroBatch], tuple[int, ...]] = [], ()

    def _load(self, chunks: list[QwenVLModel], *, allow_narrowing: bool) -> None:
        load_hf(chunks, self.model_path, self.parallel, allow_narrowing=allow_narrowing)

    def start_phase(self, section: OptimizerSection, total_updates: int) -> None:
        """A fresh optimizer and schedule on the present weights. `section.name` must be that of the constructor."""
        self.optimizer, self.scheduler = make_optimizer(self.chunks, section, total_updates)

    def rest(self, *, move: bool = True) -> None:
        """Leave the GPU's memory to others, see train.offload; weights can be sent and checkpoints written meanwhile."""
        self._offload.rest(self.chunks, self.optimizer, move=move)

    def resume(self) -> None:
        """Make ready for updates after `rest`."""
        self._offload.resume(self.chunks)

    def share_prompts(self, on: bool) -> None:
        """Whether samples of one prompt share its rows (`training.share_prompts`); they do unless told otherwise."""
        self.row_layout = replace(self.row_layout, share_prompts=on)

    # --- forward only ---

    def logprobs(self, samples: Sequence[Sample], temperature: float = 1.0) -> list[Tensor] | None:
        """Log-probability of every token given those before it (index 0: 0), fp32 [S] each, in the samples' order.

        → on the last stage of data-parallel rank 0; None on the other ranks. For checks and evaluation, not for training: every
        data-parallel rank computes all samples.
        """
        loss = partial(step.logprobs_only, temperature=temperature)
        return self._per_sample(samples, loss, "logprobs_T", packing.unshift)

    def logits(self, samples: Sequence[Sample]) -> list[Tensor] | None:
        """Logits after every token, fp32 [S, vocabulary] each; where and for what as `logprobs`."""
        return self._per_sample(samples, step.full_logits, "logits_TV", packing.split)

    def _per_sample(
        self,
        samples: Sequence[Sample],
        loss: Callable[..., tuple[Tensor, Metrics]],
        name: str,
        cut: Callable[[Tensor, MicroBatch], list[Tensor]],
    ) -> list[Tensor] | None:
        batches = self._micro_batches(shares(Batch.of(samples), replace(self.rules, data_ranks=1))[0])
        parts = self._forward_only(batches, loss)
        if not self.parallel.last_stage or self.parallel.data.rank:
            return None
        found: dict[int, Tensor] = {}
        for batch, part in zip(batches, parts, strict=True):
            found.update(zip(batch.sample_indices, cut(part[name], batch), strict=True))
        return [found[index] for index in range(len(samples))]

    def _forward_only(self, batches: list[MicroBatch], loss: Callable[..., tuple[Tensor, Metrics]]) -> list[Metrics]:
        for chunk in self.chunks:
            chunk.eval()
        loss = partial(loss, parallel=self.parallel)
        return step.run_schedule(self.chunks, batches, loss, self.parallel, forward_only=True)

    # --- training ---

    @property
    def rules(self) -> Rules:
        """What a plan for these ranks keeps to."""
        return Rules(
            data_ranks=self.parallel.data.size,
            max_tokens=self.max_tokens,
            rows=self.row_layout,
            multiple_of=self.parallel.pipeline.size if len(self.chunks) > 1 else 1,
        )

    def train(self, batch: Batch, loss: str, options: Mapping[str, Any], **objective: Any) -> list[dict[str, float]]:
        """`learn` on this rank's share of a whole batch. Keywords are fields of `step.Objective`."""
        tower_ranks = self.frozen_tower.ranks if self.frozen_tower else 0
        share = shares(batch, self.rules, tower_ranks)[self.parallel.data.rank]
        return self.learn(share, step.Objective(loss, options, **objective))

    def sft(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`supervise` on this rank's share of all samples."""
        return self.supervise(self._share(samples))

    def accumulate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Gradients of the supervised loss without an optimizer step, for parity checks. They stand in `main_grad`."""
        share = self._share(samples)
        return self._gradients(self._micro_batches(share), self._supervised_loss(share))

    def learn(self, share: Share, objective: step.Objective) -> list[dict[str, float]]:
        """All optimizer steps of one rollout step. → the metrics of each, complete on ranks of the last stage.

        Old log-probabilities are those of the weights before the first step, unless the samples bring them. What the first step learns from
        has them in its own forward pass; a pass of its own over the others comes before it (over all, when the KL to the reference is taken
        from rewards: these have to be known first). Those of the reference are computed here, when the trainer has one.
        """
        batches = self._micro_batches(share, self._frozen_features(share))
        first = 0 if objective.shaping is not None and objective.shaping.kl_coefficient > 0 else share.updates[0].stop
        batches[first:] = self._with_logprobs(batches[first:], "old", share, objective)
        if self.reference is not None:
            with self.reference.swapped_in():
                batches = self._with_logprobs(batches, "ref", share, objective)
        if objective.shaping is not None and self.parallel.last_stage:
            batches = credit_tokens(batches, objective.shaping, self._sum_over_data)
        if share.scheduled is not None:
            self.scheduler.num_steps = share.scheduled
        results = []
        for _ in range(objective.passes):
            for update in share.updates:
                own = slice(update.start, update.stop)
                old: list[tuple[Tensor, Tensor]] = []
                loss = partial(
                    step.policy_step_loss, parallel=self.parallel, objective=objective, update=update, old=old
                )
                results.append(self._update(batches[own], loss))
                if old:  # on ranks of the last stage, of a first step whose batches had none
                    batches[own] = [
                        replace(batch, old_logprobs_T=logprobs, entropy_T=entropy)
                        for batch, (logprobs, entropy) in zip(batches[own], old, strict=True)
                    ]
        # Pictures are not needed for it; values are fetched from the device when someone asks.
        self._learned = [replace(batch, vision=None) for batch in batches], share.places
        tokens = sum(update.tokens for update in share.updates)
        gap = mismatch(batches, share.parcel.samples, self.parallel, tokens)
        return [result | gap for result in results]

    def began_with(self, count: int) -> dict[int, BeganWith]:
        """What the weights before the last `learn` thought of those among its batch's first `count` samples that this rank has.

        By place in the batch; on ranks of the last stage, elsewhere none.
        """
        batches, places = self._learned
        found = {}
        for batch in batches:
            if batch.old_logprobs_T is None:
                continue
            known = [batch.old_logprobs_T] if batch.entropy_T is None else [batch.old_logprobs_T, batch.entropy_T]
            for index, *values in zip(
                batch.sample_indices, *(packing.unshift(one, batch) for one in known), strict=True
            ):
                if places[index] < count:
                    found[places[index]] = BeganWith(*(value.float().cpu().numpy() for value in values))
        return found

    def supervise(self, share: Share) -> dict[str, float]:
        """One supervised optimizer step: token mean over the samples of all data-parallel ranks."""
        return self._update(self._micro_batches(share), self._supervised_loss(share))

    def _supervised_loss(self, share: Share) -> step.LossFunction:
        return partial(step.supervised_loss, parallel=self.parallel, global_tokens=share.updates[0].tokens)

    def _share(self, samples: Sequence[Sample]) -> Share:
        return shares(Batch.of(samples), self.rules)[self.parallel.data.rank]

    def _frozen_features(self, share: Share) -> packing.Features | None:
        """Of the share's pictures, for all updates and passes of the step; None when the tower learns."""
        if self.frozen_tower is None or not share.tower:
            return None
        pictures = {picture.key: picture for picture in unwrap_pictures(share.parcel)}
        return self.frozen_tower.features(share.tower, pictures, wanted=packing.distinct_pictures(unwrap(share.parcel)))

    def _micro_batches(self, share: Share, features: packing.Features | None = None) -> list[MicroBatch]:
        samples = unwrap(share.parcel)
        return [packing.pack(samples, row, self.row_layout, features, share.brought) for row in share.rows]

    def _with_logprobs(
        self, batches: list[MicroBatch], which: str, share: Share, objective: step.Objective
    ) -> list[MicroBatch]:
        """With the present weights' log-probabilities as "old" or "ref" ones, unless all samples of the batch bring them.

        They exist on ranks of the last stage; elsewhere micro-batches pass unchanged.
        """
        if not batches or f"{which}_logprobs_S" in share.brought:
            return batches
        parts = self._forward_only(batches, partial(step.logprobs_only, temperature=objective.temperature))
        if not parts:
            return batches
        known: list[dict[str, Any]] = [{f"{which}_logprobs_T": part["logprobs_T"]} for part in parts]
        if which == "old":
            known = [values | {"entropy_T": part["entropy_T"]} for values, part in zip(known, parts, strict=True)]
        return [replace(batch, **values) for batch, values in zip(batches, known, strict=True)]

    def _sum_over_data(self, values: Tensor) -> Tensor:
        if self.parallel.data.size == 1:
            return values
        moved = values.to(self.parallel.device)
        dist.all_reduce(moved, group=self.parallel.data.group)
        return moved.to(values.device)

    def _gradients(self, micro_batches: list[MicroBatch], loss: step.LossFunction) -> dict[str, float]:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        parts = step.run_schedule(self.chunks, micro_batches, loss, self.parallel, forward_only=False)
        return reduce_metrics([step.reduce_over_data(parts, self.parallel)])

    def _update(self, micro_batches: list[MicroBatch], loss: step.LossFunction) -> dict[str, float]:
        self.optimizer.zero_grad()
        metrics = self._gradients(micro_batches, loss)
        self.scheduler.step(1)  # before the step, so that warm-up's first update is not at rate 0
        with cuda_type_names():
            finite, grad_norm, _ = self.optimizer.step()
        if not finite or not torch.isfinite(torch.tensor(float(grad_norm))):
            raise UserError(
                f"the gradient is not finite (norm {grad_norm}); lower optimizer.lr or look for extreme rollouts in this step"
            )
        return metrics | {"grad_norm": float(grad_norm), "actor_lr": learning_rate(self.optimizer)}

    # --- weights ---

    def hf_weights(
        self, *, select: Callable[[nn.Parameter], Tensor] | None = None, skip: frozenset[str] = frozenset()
    ) -> Iterable[tuple[str, Tensor | None]]:
        """(HF name, full tensor) in table order, a collective in lockstep; None in place of the tensor where it is not received."""
        chunks = [chunk.module for chunk in self.chunks]
        return iter_hf_weights(chunks, self.parallel, skip=skip, select=select)

    def weight_source(self) -> MegatronWeightSource:
        """The weights that learn, as vLLM's weight transfer wants them: declared first, then streamed.

        What is frozen does not travel: engines have it from the same checkpoint.
        """
        table = table_of(self.chunks).values()
        fixed = unsent(table, self.frozen)
        dtype = self.chunks[0].config.params_dtype
        declared = [TensorMeta(name, dtype, tuple(shape)) for name, shape in tensors_of(table, fixed)]
        sent = {meta.name for meta in declared}
        return MegatronWeightSource(
            partial(self.hf_weights, skip=fixed),
            declared,
            unchanged=[name for name, _ in tensors_of(table) if name not in sent],
        )

    def frozen_fingerprints(self) -> dict[str, Fingerprint]:
        """Of the weights that do not travel, on rank 0 (elsewhere empty). Collective; computed once, for they do not change."""
        if self._frozen_fingerprints is None:
            table = table_of(self.chunks).values()
            moving = {row.megatron for row in table} - unsent(table, self.frozen)
            weights = self.hf_weights(skip=frozenset(moving))
            self._frozen_fingerprints = {name: fingerprint(tensor) for name, tensor in weights if tensor is not None}
        return self._frozen_fingerprints

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write a Hugging Face directory (collective; world rank 0 writes)."""
        export_hf([chunk.module for chunk in self.chunks], self.parallel, self.model_path, output, card=card)
