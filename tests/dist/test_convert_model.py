"""HF → Megatron → HF is bitwise on the real model at every layout, and what comes out loads anywhere."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.model import build_model
from eureka_megatron.parallel.runtime import Parallel, init_parallel
from eureka_megatron.release.live import export_hf
from eureka_megatron.weights import hf_metadata, iter_hf_weights, load_hf
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.online import own_parameters
from eureka_megatron.weights.table import hub_name
from tests.helpers.naming import newer_name
from tests.helpers.ranks import run_ranks

# (tensor, pipeline, data, sequence parallel); kv heads are 2, so tensor 4 has fewer kv heads than ranks
LAYOUTS = [
    (1, 1, 1, False),
    (2, 1, 1, True),
    (4, 1, 1, False),
    (1, 2, 1, False),
    (1, 4, 1, False),
    (2, 2, 1, True),
    (2, 1, 2, False),
    (1, 2, 2, False),
]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    reader = Reader(directory, rename=hub_name)
    return {name: digest(reader[name]) for name in reader.tensors}


def build(rank: int, directory: str, layout: tuple, dtype: torch.dtype) -> tuple[list, Parallel]:
    tensor, pipeline, data, sequence_parallel = layout
    world = tensor * pipeline * data
    parallel = init_parallel(
        Layout(tensor=tensor, pipeline=pipeline, sequence_parallel=sequence_parallel), rank=rank, world_size=world
    )
    chunks = build_model(read_hf_config(directory), parallel, Execution(dtype=str(dtype).removeprefix("torch.")))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)  # what is not loaded shows
    return chunks, parallel


def receive(rank: int, directories: list[str], layout: tuple, dtype: torch.dtype) -> list[tuple]:
    """For each checkpoint: what this rank receives after loading it."""
    results = []
    for directory in directories:
        chunks, parallel = build(rank, directory, layout, dtype)
        load_hf(chunks, directory, parallel)
        received = [
            (name, None if weight is None else (digest(weight), tuple(weight.shape)))
            for name, weight in iter_hf_weights(chunks, parallel)
        ]
        results.append((received, parallel.tensor.rank == 0 and parallel.pipeline.rank == 0))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_round_trip_is_bitwise_at_every_layout(tmp_path, layout):
    options = {"randomize_all": True, "dtype": torch.bfloat16, "max_shard_size": "500KB"}
    tied, untied = (build_published(tmp_path / str(tied), tied=tied, **options) for tied in (True, False))
    world = layout[0] * layout[1] * layout[2]
    ranks = run_ranks(receive, world, [str(tied), str(untied)], layout, torch.bfloat16)
    for case, directory in enumerate((tied, untied)):
        expected, metadata = digests(directory), hf_metadata(read_hf_config(directory))
        for received, receives in (results[case] for results in ranks):
            assert [name for name, _ in received] == [name for name, _ in metadata]
            if receives:
                assert {name: found[0] for name, found in received} == expected
                assert [(name, found[1]) for name, found in received] == metadata
            else:
                assert all(found is None for _, found in received)


def test_both_namings_and_single_or_sharded_files_load_alike(tmp_path):
    hub = build_published(tmp_path / "hub", randomize_all=True)
    new = shutil.copytree(hub, tmp_path / "new")
    renamed = {newer_name(name): tensor for name, tensor in load_file(hub / "model.safetensors").items()}
    save_file(renamed, new / "model.safetensors")
    assert not set(renamed) <= set(digests(hub))
    (((received, _),),) = run_ranks(receive, 1, [str(new)], LAYOUTS[0], torch.float32)
    assert {name: found[0] for name, found in received} == digests(hub)


def load_widened(rank: int, directory: str) -> bool:
    chunks, parallel = build(rank, directory, LAYOUTS[0], torch.float32)
    load_hf(chunks, directory, parallel)
    source = Reader(directory, rename=hub_name)
    return all(torch.equal(weight, source[name].float()) for name, weight in iter_hf_weights(chunks, parallel))


def test_bfloat16_widens_into_float32_parameters_exactly(tmp_path):
    directory = build_published(tmp_path, randomize_all=True, dtype=torch.bfloat16)
    assert run_ranks(load_widened, 1, str(directory)) == [True]


def load_narrowed(rank: int, directory: str) -> tuple[str, bool]:
    chunks, parallel = build(rank, directory, (2, 1, 1, False), torch.bfloat16)
    try:
        load_hf(chunks, directory, parallel)
        message = ""
    except UserError as error:
        message = str(error)
    untouched = all(bool(parameter.isnan().all()) for parameter in own_parameters(chunks).values())
    load_hf(chunks, directory, parallel, allow_narrowing=True)
    source = Reader(directory, rename=hub_name)
    weights = list(iter_hf_weights(chunks, parallel))
    same = all(rank > 0 or torch.equal(weight, source[name].bfloat16()) for name, weight in weights)
    return message, untouched and same


def test_narrowing_needs_permission(tmp_path):
    directory = build_published(tmp_path, randomize_all=True)
    for message, good in run_ranks(load_narrowed, 2, str(directory)):
        assert "would lose precision" in message
        assert "lm_head.weight is torch.float32, the parameter torch.bfloat16" in message
        assert good


def iterate_twice(rank: int, directory: str) -> list[tuple[bool, bool]]:
    """Weights doubled by `select`, and cast by `dtype`."""
    chunks, parallel = build(rank, directory, (2, 2, 1, False), torch.float32)
    load_hf(chunks, directory, parallel)
    source = Reader(directory, rename=hub_name)
    doubled = iter_hf_weights(chunks, parallel, select=lambda parameter: parameter.double() * 2)
    checks = [(rank > 0 or torch.equal(weight, source[name].double() * 2), True) for name, weight in doubled]
    narrow = iter_hf_weights(chunks, parallel, dtype=torch.bfloat16)
    return checks + [(True, rank > 0 or torch.equal(weight, source[name].bfloat16())) for name, weight in narrow]


def test_select_and_dtype_choose_what_is_exported(tmp_path):
    directory = build_published(tmp_path, tied=True, randomize_all=True)
    for checks in run_ranks(iterate_twice, 4, str(directory)):
        assert all(selected and cast for selected, cast in checks)


def wrapped_gradients(rank: int, directory: str) -> bool:
    """Through DDP: names are seen through the wrapper, `main_grad` is exported."""
    from eureka_megatron.config import OptimizerSection
    from eureka_megatron.train.optimizer import wrap

    chunks, parallel = build(rank, directory, (2, 1, 1, False), torch.float32)
    load_hf(chunks, directory, parallel)
    wrapped = wrap(chunks, OptimizerSection())
    for parameter in own_parameters(wrapped).values():
        parameter.main_grad.copy_(parameter.data * 3)
    source = Reader(directory, rename=hub_name)
    gradients = iter_hf_weights(wrapped, parallel, select=lambda parameter: parameter.main_grad)
    return all(rank > 0 or torch.equal(gradient, source[name] * 3) for name, gradient in gradients)


def test_gradients_come_out_under_hf_names(tmp_path):
    directory = build_published(tmp_path, randomize_all=True)
    assert run_ranks(wrapped_gradients, 2, str(directory)) == [True, True]


def load_broken(rank: int, directory: str) -> tuple[str, bool]:
    good = Path(directory) / "good"
    chunks, parallel = build(rank, str(good), (1, 2, 1, False), torch.float32)
    try:
        load_hf(chunks, Path(directory) / "bad", parallel)
        return "", False
    except UserError as error:
        return str(error), all(bool(parameter.isnan().all()) for parameter in own_parameters(chunks).values())


def test_all_that_is_wrong_is_named_on_every_rank_and_nothing_is_loaded(tmp_path):
    build_published(tmp_path / "good")
    bad = build_published(tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    del weights["model.norm.weight"], weights["visual.blocks.0.attn.qkv.bias"]
    weights["model.layers.9.extra"] = torch.zeros(3)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.int8)
    save_file(weights, bad / "model.safetensors")
    messages = run_ranks(load_broken, 2, str(tmp_path))
    assert messages[0] == messages[1]
    message, untouched = messages[0]
    assert untouched
    assert "2 tensors are missing: visual.blocks.0.attn.qkv.bias, model.norm.weight" in message
    assert "1 tensors have no place in this model: model.layers.9.extra (model.safetensors)" in message
    assert "up_proj.weight (model.safetensors) is (2, 2), expected (256, 128)" in message
    assert "model.layers.1.mlp.up_proj.weight (model.safetensors) is torch.int8" in message


def test_a_spare_output_layer_of_a_tied_checkpoint_must_equal_the_embedding(tmp_path):
    build_published(tmp_path / "good", tied=True)
    bad = build_published(tmp_path / "bad", tied=True)
    weights = load_file(bad / "model.safetensors")
    for change in (0.0, 1.0):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][300, 3] += change
        save_file(weights, bad / "model.safetensors")
        for message, _ in run_ranks(load_broken, 2, str(tmp_path)):
            assert ("lm_head.weight differs from the embedding" in message) == (change > 0)


def export(rank: int, directory: str, output: str, layout: tuple, dtype: torch.dtype | None) -> str:
    chunks, parallel = build(rank, directory, layout, torch.float32)
    load_hf(chunks, directory, parallel)
    try:
        card = {"base_model": "tiny", "algorithm": "GRPO", "scores": {"count": 0.8125}, "hyperparameters": {"lr": 1e-6}}
        export_hf(chunks, parallel, directory, output, dtype=dtype, card=card, max_shard_bytes=2 * 10**6)
    except UserError as error:
        return str(error)
    dist.barrier()
    return ""


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [((1, 1, 1, False), torch.bfloat16), ((2, 2, 1, True), None), ((2, 1, 2, False), None)],
    ids=str,
)
def test_an_export_is_a_checkpoint_that_transformers_loads(tmp_path, layout, dtype):
    directory = build_published(tmp_path / "source", tied=layout[1] > 1, randomize_all=True)
    output = tmp_path / "release"
    world = layout[0] * layout[1] * layout[2]
    assert run_ranks(export, world, str(directory), str(output), layout, dtype) == [""] * world
    source, released = Reader(directory), Reader(output)
    assert set(source.tensors) == set(released.tensors)
    assert len(released.files) > 1
    for name in source.tensors:
        assert torch.equal(released[name], source[name].to(dtype or torch.float32))
    model, report = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert model.dtype == (dtype or torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        AutoTokenizer.from_pretrained(output)("3").input_ids == AutoTokenizer.from_pretrained(directory)("3").input_ids
    )
    assert AutoProcessor.from_pretrained(output).image_processor.patch_size == 14
    assert "| count | 0.8125 |" in (output / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_an_export_does_not_overwrite_and_says_so_on_every_rank(tmp_path):
    directory = build_published(tmp_path / "source")
    output = tmp_path / "release"
    output.mkdir()
    (output / "precious").write_text("x")
    messages = run_ranks(export, 2, str(directory), str(output), (2, 1, 1, False), None)
    assert messages == [f"{output} exists and is not overwritten; remove it or choose another output"] * 2
    assert [path.name for path in output.iterdir()] == ["precious"]


def export_on_full_disk(rank: int, directory: str, output: str) -> str:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    chunks, parallel = build(rank, directory, (1, 2, 1, False), torch.float32)
    load_hf(chunks, directory, parallel)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    try:
        export_hf(chunks, parallel, directory, output, card={})
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_ends_the_export_on_every_rank_and_leaves_nothing(tmp_path):
    directory = build_published(tmp_path / "source")
    messages = run_ranks(export_on_full_disk, 2, str(directory), str(tmp_path / "release"))
    assert messages[0] == messages[1]
    assert "release cannot be written: File too large" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
