"""The policy on this trainer rank: model chunks, optimizer, and what one rollout step asks of them.

Knows nothing of Ray or vLLM: `actor` puts it into a process, tests run it in plain spawned ranks.

Shapes: T rows of a packed micro-batch, S tokens of one sample.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eureka_megatron.config import OptimizerSection
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.model import build_model
from eureka_megatron.models.qwen2_5_vl.transformer_config import fp8_rows
from eureka_megatron.parallel.cpu import cuda_type_names
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.release.live import export_hf
from eureka_megatron.rl.losses import Metrics, policy_loss, reduce_metrics
from eureka_megatron.rl.shaping import Shaping
from eureka_megatron.sync.check import Fingerprint, fingerprint
from eureka_megatron.sync.source import MegatronWeightSource, TensorMeta
from eureka_megatron.train import packing, prepare, step
from eureka_megatron.train.freeze import freeze as freeze_parameters
from eureka_megatron.train.freeze import frozen_tower
from eureka_megatron.train.optimizer import learning_rate, make_optimizer, wrap
from eureka_megatron.train.reference import ReferenceWeights
from eureka_megatron.types import Batch, MicroBatch, Sample
from eureka_megatron.weights import iter_hf_weights, load_hf
from eureka_megatron.weights.online import table_of
from eureka_megatron.weights.table import tensors_of, unsent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyTrainer:
    """One rank's share of the policy. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        model_path: Path | str,
        parallel: Parallel,
        *,
        dtype: str = "float32",
        backend: str = "local",
        freeze: Iterable[str] = (),
        recompute: str = "none",
        vision_parallel: str = "replicated",
        fp8: str = "none",
        fp8_recipe: str = "delayed",
        max_tokens_per_micro_batch: int = 16384,
        optimizer: OptimizerSection | None = None,
        reference: Path | str | None = None,
    ) -> None:
        self.parallel = parallel
        self.model_path = Path(model_path)
        self.max_tokens = max_tokens_per_micro_batch
        self.hf_config = read_hf_config(model_path)
        multiple = fp8_rows(fp8, fp8_recipe, sequence_parallel=parallel.sequence_parallel)
        self.row_layout = packing.row_layout(parallel, vision_parallel, multiple)
        chunks = build_model(
            self.hf_config,
            parallel,
            dtype=DTYPES[dtype],
            backend=backend,
            recompute=recompute,
            vision_parallel=vision_parallel,
            fp8=fp8,
            fp8_recipe=fp8_recipe,
        )
        self.frozen = freeze_parameters(chunks, tuple(freeze))
        # Whoever asks for bf16 gets it, from fp32 checkpoints too; the distributed optimizer's masters start from what was loaded.
        narrow = dtype == "bfloat16"
        self.reference: ReferenceWeights | None = None
        if reference is not None:
            same = Path(reference).resolve() == self.model_path.resolve()
            self.reference = ReferenceWeights(
                chunks, Path(reference), parallel, allow_narrowing=narrow, same_checkpoint=same
            )
        load_hf(chunks, self.model_path, parallel, allow_narrowing=narrow)
        merge = self.hf_config.vision_config.spatial_merge_size
        # None on stages without a tower and when the tower learns.
        self.frozen_tower = frozen_tower(chunks, parallel, max_tokens_per_micro_batch * merge**2)
        self.chunks = wrap(chunks, optimizer or OptimizerSection())
        self.optimizer: Any = None
        self._frozen_prints: dict[str, Fingerprint] | None = None

    def start_phase(self, section: OptimizerSection, total_updates: int) -> None:
        """A fresh optimizer and schedule on the present weights. `section.name` must be that of the constructor."""
        self.optimizer, self.scheduler = make_optimizer(self.chunks, section, total_updates)

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
        self, samples: Sequence[Sample], loss: Any, name: str, cut: Callable[[Tensor, MicroBatch], list[Tensor]]
    ) -> list[Tensor] | None:
        batches = self._micro_batches(samples, range(len(samples)), data_parallel=1)[0]
        parts = self._forward_only(batches, loss)
        if not self.parallel.last_stage or self.parallel.data.rank:
            return None
        found: dict[int, Tensor] = {}
        for batch, part in zip(batches, parts, strict=True):
            found.update(zip(batch.sample_indices, cut(part[name], batch), strict=True))
        return [found[index] for index in range(len(samples))]

    def _forward_only(self, batches: list[MicroBatch], loss: Any) -> list[Metrics]:
        for chunk in self.chunks:
            chunk.eval()
        return step.run_schedule(
            self.chunks, batches, partial(loss, parallel=self.parallel), self.parallel, forward_only=True
        )

    # --- training ---

    def train(
        self,
        batch: Batch,
        loss: str,
        options: dict[str, Any],
        compat: str | None = None,
        passes: int = 1,
        shaping: Shaping | None = None,
        temperature: float = 1.0,
    ) -> list[dict[str, float]]:
        """All optimizer steps of one rollout step. → the metrics of each, complete on ranks of the last stage.

        The policy is softmax(logits / temperature), that which was sampled: all log-probabilities, ratios, KL terms, entropies and
        gradients are its own. Old log-probabilities are those of the weights before the first step, computed here once over all micro-batches, unless the
        samples bring them; those of the reference likewise, when the trainer has one.
        """
        features = self._frozen_features(batch)
        updates = [
            self._micro_batches(batch.samples, indices, features=features)[self.parallel.data.rank]
            for indices in batch.updates
        ]
        flat = [one for micro_batches in updates for one in micro_batches]
        forward = partial(self._forward_only, loss=partial(step.logprobs_only, temperature=temperature))
        flat = prepare.with_logprobs(flat, batch.samples, forward, "old")
        if self.reference is not None:
            with self.reference.swapped_in():
                flat = prepare.with_logprobs(flat, batch.samples, forward, "ref")
        gap = prepare.engine_gap(flat, batch.samples, self.parallel.device)
        gap = reduce_metrics([step.reduce_over_data([{"logprob_abs_diff_max": gap}], self.parallel)])
        if shaping is not None:
            flat = prepare.with_shaped_advantages(flat, shaping, self.parallel)
        if batch.scheduled is not None:
            self.scheduler.num_steps = batch.scheduled
        places = iter(flat)
        updates = [[next(places) for _ in micro_batches] for micro_batches in updates]
        results = []
        for _ in range(passes):
            for micro_batches, indices in zip(updates, batch.updates, strict=True):
                tokens, sequences = _global_counts([batch.samples[index] for index in indices])

                def policy(
                    hidden: Tensor,
                    weight: Tensor,
                    one: MicroBatch,
                    tokens: float = tokens,
                    sequences: float = sequences,
                ) -> tuple[Tensor, Metrics]:
                    inputs = step.policy_inputs(hidden, weight, one, self.parallel, tokens, sequences, temperature)
                    return policy_loss(loss, inputs, compat=compat, **options)

                results.append(self._update(micro_batches, policy) | gap)
        return results

    def sft(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One supervised optimizer step on these samples: token mean over all of them, on all data-parallel ranks."""
        indices = range(len(samples))
        tokens, _ = _global_counts(samples)
        loss = partial(step.supervised_loss, parallel=self.parallel, global_tokens=tokens)
        return self._update(self._micro_batches(samples, indices)[self.parallel.data.rank], loss)

    def accumulate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Gradients of the supervised loss without an optimizer step, for parity checks. They stand in `main_grad`."""
        tokens, _ = _global_counts(samples)
        loss = partial(step.supervised_loss, parallel=self.parallel, global_tokens=tokens)
        return self._gradients(self._micro_batches(samples, range(len(samples)))[self.parallel.data.rank], loss)

    def _frozen_features(self, batch: Batch) -> packing.Features | None:
        """Of this data-parallel rank's pictures, for all updates and passes of the step; None when the tower learns."""
        if self.frozen_tower is None or not any(sample.pictures for sample in batch.samples):
            return None
        rank = self.parallel.data.rank
        mine = {
            index
            for indices in batch.updates
            for places in self._plan(batch.samples, indices)[rank]
            for index in places
        }
        return self.frozen_tower.features(batch.samples, [batch.samples[index] for index in mine])

    def _micro_batches(
        self,
        samples: Sequence[Sample],
        indices: Iterable[int],
        data_parallel: int | None = None,
        features: packing.Features | None = None,
    ) -> list[list[MicroBatch]]:
        mine = self.parallel.data.rank if data_parallel is None else 0
        # Only this rank's share is laid out; the others are counted, not built.
        return [
            [packing.pack(samples, places, self.row_layout, features) for places in micro_batches]
            if rank == mine
            else []
            for rank, micro_batches in enumerate(self._plan(samples, indices, data_parallel))
        ]

    def _plan(
        self, samples: Sequence[Sample], indices: Iterable[int], data_parallel: int | None = None
    ) -> list[list[list[int]]]:
        """`[rank][micro-batch]`: indices into `samples`."""
        indices, layout = list(indices), self.row_layout
        plans = packing.plan(
            [layout.filled(len(samples[index])) for index in indices],
            [packing.cost(samples[index]) for index in indices],
            data_parallel or self.parallel.data.size,
            self.max_tokens,
            layout.align,
            multiple_of=self.parallel.pipeline.size if len(self.chunks) > 1 else 1,
        )
        return [[[indices[place] for place in places] for places in micro_batches] for micro_batches in plans]

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
    ) -> Iterable[tuple[str, Any]]:
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
        if self._frozen_prints is None:
            table = table_of(self.chunks).values()
            moving = {row.megatron for row in table} - unsent(table, self.frozen)
            weights = self.hf_weights(skip=frozenset(moving))
            self._frozen_prints = {name: fingerprint(tensor) for name, tensor in weights if tensor is not None}
        return self._frozen_prints

    def export(self, output: Path, card: dict[str, Any]) -> None:
        """Write a Hugging Face directory (collective; world rank 0 writes)."""
        export_hf([chunk.module for chunk in self.chunks], self.parallel, self.model_path, output, card=card)


def _global_counts(samples: Sequence[Sample]) -> tuple[float, float]:
    """Learned tokens and sequences that have any, over the whole update. At least 1 each, so that an all-masked update is 0, not NaN."""
    counts = [float(sample.mask_S[1:].sum()) for sample in samples]
    return max(sum(counts), 1.0), max(float(sum(count > 0 for count in counts)), 1.0)
