"""What the workers of a tensor-parallel engine hold, as vLLM's own layers and loaders cut it, gives the fingerprints of the whole tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eureka_megatron.errors import ConfigError
from eureka_megatron.models.qwen2_5_vl.config import check_engine, read_hf_config, tower_divides
from eureka_megatron.sync import check
from eureka_megatron.sync.check import combine, engine_pieces, engine_tensors, fingerprint, piece
from eureka_megatron.sync.source import SyncError, TensorMeta

HIDDEN, HEAD, HEADS, KV_HEADS, FFN, WORDS = 16, 4, 8, 2, 24, 100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors span several, and shards end within them."""
    monkeypatch.setattr(check, "_CHUNK", 97)
    check._multipliers.cache_clear()
    yield
    check._multipliers.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 30), (301,), (5, 2, 3, 7)])
def test_pieces_add_up_to_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = torch.randn(shape, dtype=dtype)
    meta = TensorMeta("x", dtype, shape)
    by_rows = [[piece(meta, part, (first, 0))] for first, part in ((0, whole[:3]), (3, whole[3:4]), (4, whole[4:]))]
    assert combine(by_rows)["x"].same(fingerprint(whole))
    if len(shape) == 2:
        by_columns = [[piece(meta, part, (0, first))] for first, part in ((0, whole[:, :7]), (7, whole[:, 7:]))]
        assert combine(by_columns)["x"].same(fingerprint(whole))
        swapped = [[piece(meta, whole[:, :15], (0, 15)), piece(meta, whole[:, 15:], (0, 0))]]
        assert not combine(swapped)["x"].same(fingerprint(whole))


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "qkv": ["qkv"]}


class Model(nn.Module):
    """One layer of every kind that Qwen2.5-VL has in vLLM."""

    def __init__(self) -> None:
        from vllm.model_executor.layers import linear
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        super().__init__()
        self.packed_modules_mapping = PACKED
        self.layer = nn.ModuleDict(
            {
                "qkv_proj": linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS),  # with a bias
                "qkv": linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, HEADS),
                "gate_up_proj": linear.MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False),
                "fc1": linear.ColumnParallelLinear(HIDDEN, FFN),
                "down_proj": linear.RowParallelLinear(FFN, HIDDEN),
                "whole": linear.ReplicatedLinear(HIDDEN, FFN),
                "embed_tokens": VocabParallelEmbedding(WORDS, HIDDEN),
                "lm_head": ParallelLMHead(WORDS, HIDDEN),
            }
        )

    def load(self, tensors: dict[str, Tensor]) -> None:
        """By vLLM's loaders, which take a worker's shard out of the whole tensor."""
        fused = {part: (whole, n) for whole, parts in PACKED.items() if whole != "qkv" for n, part in enumerate(parts)}
        for name, tensor in tensors.items():
            _, part, leaf = name.split(".")
            target, number = fused.get(part, (part, None))
            parameter = getattr(self.layer[target], leaf)
            shard = "qkv"[number] if target == "qkv_proj" else number
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


@pytest.mark.parametrize("workers", [1, 2, 4])  # with 4, two hold the same key and value head
def test_shards_of_vllms_layers_give_the_fingerprints_of_whole_tensors(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    kv, everything = KV_HEADS * HEAD, 3 * HEADS * HEAD
    shapes = {"q_proj": HEADS * HEAD, "k_proj": kv, "v_proj": kv, "qkv": everything, "fc1": FFN, "whole": FFN}
    tensors = {f"layer.{name}.bias": torch.randn(rows) for name, rows in shapes.items()}
    shapes |= {"gate_proj": FFN, "up_proj": FFN, "embed_tokens": WORDS, "lm_head": WORDS}
    tensors |= {f"layer.{name}.weight": torch.randn(rows, HIDDEN) for name, rows in shapes.items()}
    tensors |= {"layer.down_proj.weight": torch.randn(HIDDEN, FFN), "layer.down_proj.bias": torch.randn(HIDDEN)}

    models = []
    for rank in range(workers):
        for module in (linear, vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: workers)
        with set_current_vllm_config(VllmConfig()):
            model = Model()
            model.load(tensors)
        models.append(model)
    for model in models:
        assert {t.meta.name: t.meta.shape for t in engine_tensors(model)} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
    found = combine(map(engine_pieces, models))
    assert [name for name, tensor in tensors.items() if not found[name].same(fingerprint(tensor))] == []

    with torch.no_grad():
        models[-1].layer["qkv_proj"].weight[-1, 0] += 1  # the last row of its last value head
        models[-1].layer["down_proj"].weight[0, -1] += 1
    if workers == 4:
        with pytest.raises(
            SyncError, match=r"1 tensors are not the same in all workers .* copy of them: layer.v_proj.weight"
        ):
            combine(map(engine_pieces, models))
    else:
        found = combine(map(engine_pieces, models))
        assert sorted(name for name, tensor in tensors.items() if not found[name].same(fingerprint(tensor))) == [
            "layer.down_proj.weight",
            "layer.v_proj.weight",
        ]


def test_engines_that_the_text_model_cannot_be_split_over_are_refused(tiny_dir: Path) -> None:
    config = read_hf_config(tiny_dir)
    for tensor in (1, 2, 4):
        check_engine(config, tensor)
        assert tower_divides(config.vision_config, tensor)
    with pytest.raises(
        ConfigError, match=r"rollout\.tensor=3 does not divide .*num_attention_heads=4.*possible: \[1, 2, 4\]"
    ):
        check_engine(config, 3)


def test_new_weights_reach_workers_as_memory_that_outlives_the_call() -> None:
    import numpy as np

    from eureka_megatron.rollout.worker import shared_bytes

    buffer: Any = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    with shared_bytes(buffer) as shared:
        mapped = shared.map()
    assert np.array_equal(mapped, buffer)
    with pytest.raises(FileNotFoundError):
        shared.map()
