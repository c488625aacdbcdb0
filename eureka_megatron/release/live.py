"""The trainer's present weights as a Hugging Face directory.

Written streaming by world rank 0 while all ranks of the first replica send; appears whole or not at all. The weights go
through the same iteration as the online sync. transformers' `from_pretrained` and vLLM read the directory as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.release.card import CARD_KEYS, model_card
from eureka_megatron.weights.companions import copy_companions
from eureka_megatron.weights.hf_files import MAX_SHARD_BYTES, Writer, atomic_directory, refuse_to_overwrite
from eureka_megatron.weights.online import iter_hf_weights, raise_together
from eureka_megatron.weights.table import hf_metadata


def export_hf(
    model_chunks: Sequence[nn.Module],
    parallel: Parallel,
    source_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a release directory. Collective over all ranks; world rank 0 writes.

    Args:
        source_dir: the checkpoint the training began from; configuration, tokenizer and processor come from there.
        output: must not exist, or be empty.
        dtype: of the written weights; default: that of the parameters.
        card: any of `CARD_KEYS`, for README.md. "hyperparameters" and "scores" are mappings. `git_commit` is asked from git
            when absent.

    Raises:
        UserError: on every rank alike; `output` is then as it was before.
    """
    problems = []
    if parallel.world.rank == 0:
        try:
            unknown = sorted(set(card) - set(CARD_KEYS))
            if unknown:
                raise UserError(f"unknown model card keys {', '.join(unknown)}; valid: {', '.join(CARD_KEYS)}")
            refuse_to_overwrite(output)
            read_hf_config(source_dir)
        except UserError as error:
            problems.append(str(error))
    raise_together(problems, parallel)
    failure: Exception | None = None
    if parallel.data.rank == 0 and parallel.context.rank == 0:
        weights = iter_hf_weights(model_chunks, parallel, dtype=dtype)
        if parallel.world.rank == 0:
            try:
                _write(weights, Path(source_dir), Path(output), card, max_shard_bytes)
            except Exception as error:  # of any kind: the others are waiting, they are told before it goes on
                failure = error
        for _ in weights:  # after a failure as well: the other ranks still send
            pass
    try:
        raise_together([str(failure) or repr(failure)] if failure else [], parallel)
    except UserError as shared:
        raise (failure or shared) from None


def _write(
    weights: Iterator[tuple[str, Tensor | None]], source: Path, output: Path, card: Mapping[str, Any], max_shard: int
) -> None:
    """Consumes the weights; the first one tells the dtype of all."""
    metadata = hf_metadata(read_hf_config(source))
    with atomic_directory(output) as directory:
        with ExitStack() as stack:
            writer = None
            for name, tensor in weights:
                assert tensor is not None
                if writer is None:
                    kind = tensor.dtype
                    plan = [(announced, shape, kind) for announced, shape in metadata]
                    writer = stack.enter_context(Writer(directory, plan, max_shard_bytes=max_shard))
                writer.write(name, tensor)
        copy_companions(source, directory, kind)
        (directory / "README.md").write_text(model_card(card))
