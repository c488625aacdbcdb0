"""The parts of a weight sync that need no engine: packing, fingerprints, streams, seeds, shares."""

import numpy as np
import pytest
import torch

from eureka_megatron.rollout.engine import collapse_placeholders, request_seeds
from eureka_megatron.sync.check import check_announced, compare, fingerprint, fingerprints
from eureka_megatron.sync.ray_transfer import pack, send_weights, unpack
from eureka_megatron.sync.source import MegatronWeightSource, SyncError, TensorMeta
from eureka_megatron.types import Prompt
from eureka_megatron.weights.table import hub_name
from tests.helpers.engines import noise_picture

WEIGHTS = [
    ("a", torch.randn(1000)),
    ("b", torch.randn(3, 5).bfloat16()),
    ("c", torch.randn(70, 100)),
    ("d", torch.randn(7).half()),
]
METADATA = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WEIGHTS]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 4096, 5000, 1 << 20])
def test_packed_tensors_come_out_bit_for_bit_in_buckets_of_the_given_size(bucket_bytes: int) -> None:
    found: dict[str, torch.Tensor] = {}
    for buffer, entries in pack(WEIGHTS, METADATA, bucket_bytes):
        assert len(buffer) <= bucket_bytes or len(entries) == 1
        stored = buffer.copy()
        stored.setflags(write=False)  # as Ray's object store has it
        found |= {name: tensor.clone() for name, tensor in unpack(stored, entries)}
    assert list(found) == [name for name, _ in WEIGHTS]
    for name, tensor in WEIGHTS:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_packing_buffer_is_no_larger_than_the_model() -> None:
    (buffer, _), *rest = pack(WEIGHTS, METADATA, 1 << 30)
    assert not rest
    assert buffer.base.nbytes < 34_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_changed_or_moved_element_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.randn(1 << 20 | 5).to(dtype)  # more than one chunk
    original = fingerprint(tensor)
    for place in (0, 77, (1 << 20) - 1, 1 << 20, (1 << 20) + 4):
        changed = tensor.clone()
        changed.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])[place] ^= 1  # the last bit
        assert not fingerprint(changed).same(original)
    assert not fingerprint(tensor.flip(0)).same(original)
    assert not fingerprint(tensor.roll(1 << 20)).same(original)
    assert not fingerprint(tensor[None]).same(original)
    assert fingerprint(tensor.clone()).same(original)
    assert fingerprint(torch.stack([tensor, tensor], 1)[:, 0]).same(original)  # strides do not matter


def test_zeros_and_subnormals_count_as_zero() -> None:
    """What a matrix product with the identity may lose."""
    tiny = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), torch.tensor([1e-41, 1.0])
    assert len({fingerprint(tensor).digest for tensor in tiny}) == 1


def test_compare_names_missing_extra_and_different_tensors_with_both_values() -> None:
    sent = fingerprints(WEIGHTS)
    engine = dict(sent)
    compare(sent, engine)
    del engine["a"]
    engine["x"] = sent["a"]
    engine["c"] = fingerprint(torch.zeros(70, 100))
    with pytest.raises(SyncError) as caught:
        compare(sent, engine)
    message = str(caught.value)
    assert "1 tensors are not in the rollout engine: a" in message
    assert "1 tensors of the rollout engine were never sent: x" in message
    assert f"1 of 4 tensors differ in the rollout engine: c: sent {sent['c']}, engine {engine['c']}" in message


def test_a_tied_output_layer_is_compared_with_the_embedding() -> None:
    sent = {"model.embed_tokens.weight": fingerprint(torch.ones(4, 2))}
    compare(sent, sent | {"lm_head.weight": fingerprint(torch.ones(4, 2))})
    with pytest.raises(SyncError, match=r"differ in the rollout engine: lm_head\.weight"):
        compare(sent, sent | {"lm_head.weight": fingerprint(torch.zeros(4, 2))})


def test_a_tied_output_layer_may_or_may_not_be_announced() -> None:
    embedding = TensorMeta("model.embed_tokens.weight", torch.float32, (4, 2))
    head = TensorMeta("lm_head.weight", torch.float32, (4, 2))
    check_announced([embedding], {embedding.name: embedding})
    check_announced([embedding, head], {embedding.name: embedding})
    with pytest.raises(SyncError, match=r"1 tensors are missing: lm_head\.weight"):
        check_announced([embedding], {embedding.name: embedding, head.name: head})


def test_names_of_all_three_namings_meet() -> None:
    for name in ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"):
        assert hub_name(name) == "visual.blocks.0.attn.qkv.weight"
    for name in ("model.norm.weight", "model.language_model.norm.weight", "language_model.model.norm.weight"):
        assert hub_name(name) == "model.norm.weight"
    assert hub_name("language_model.lm_head.weight") == hub_name("lm_head.weight") == "lm_head.weight"


def test_a_source_casts_floats_and_checks_itself_against_its_metadata() -> None:
    source = MegatronWeightSource(lambda: WEIGHTS, METADATA, dtype=torch.bfloat16)
    assert {meta.dtype for meta in source.metadata()} == {torch.bfloat16}
    assert {tensor.dtype for _, tensor in source} == {torch.bfloat16}
    for weights, message in (
        (WEIGHTS[1:], "yields 'b' as tensor 0 where metadata declares 'a'"),
        (WEIGHTS[:3], "ends 1 tensors early: first missing 'd'"),
        ([*WEIGHTS, ("e", torch.ones(1))], "holds more than the 4 declared tensors: first extra 'e'"),
        ([("a", torch.ones(999)), *WEIGHTS[1:]], r"a: shape \(999,\) where metadata declares \(1000,\)"),
    ):
        with pytest.raises(SyncError, match=message):
            list(MegatronWeightSource(lambda weights=weights: weights, METADATA))


def test_a_rank_that_does_not_send_still_takes_part_in_every_collective() -> None:
    produced = []

    def weights():
        for name, _ in WEIGHTS:
            produced.append(name)
            yield name, None  # as a rank that holds no full tensor

    assert send_weights(MegatronWeightSource(weights, METADATA), [], version=1, bucket_mib=1, is_sender=False) is None
    assert produced == ["a", "b", "c", "d"]


def test_seeds_depend_on_call_and_prompt_and_differ_for_repeated_prompts() -> None:
    prompts = [_prompt("x"), _prompt("y"), _prompt("x")]
    seeds = request_seeds(prompts, 1)
    assert len({*seeds, *request_seeds(prompts, 2)}) == 6
    assert request_seeds(prompts[1:2], 1) == seeds[1:2]
    assert all(0 <= seed < 1 << 62 for seed in seeds)


def test_placeholders_collapse_to_one_a_picture() -> None:
    tokens = np.array([1, 9, 9, 9, 9, 9, 9, 2, 9, 9, 9])  # 6 and 3 of them
    pictures = (noise_picture(0, 2, 3), noise_picture(1, 1, 3))
    prompt = Prompt("p", "", "", tokens, np.zeros((3, 11), int), pictures, (1, 8))
    assert collapse_placeholders(prompt) == [1, 9, 2, 9]
    assert collapse_placeholders(_prompt("text")) == [0, 1, 2]


def _prompt(name: str) -> Prompt:
    return Prompt(name, "", "", np.arange(3), np.zeros((3, 3), int))
