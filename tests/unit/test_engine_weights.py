"""What an engine is given of a directory in Megatron's format: every tensor of the Hugging Face one, under the hub's names."""

import shutil
from pathlib import Path

import pytest
import torch

from eureka_megatron.cli.commands import main
from eureka_megatron.errors import UserError
from eureka_megatron.rollout.weights import hf_tensors, load_format
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.offline import hf_to_megatron
from eureka_megatron.weights.table import hub_name
from eureka_megatron.weights.torch_dist_metadata import read_metadata, write_metadata


@pytest.fixture(scope="module", params=["tiny_dir", "tied_tiny_dir"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = request.getfixturevalue(request.param)
    target = tmp_path_factory.mktemp("engine") / "megatron"
    hf_to_megatron(source, target)
    return source, target


def test_every_tensor_comes_once_and_bitwise(both: tuple[Path, Path]) -> None:
    source, target = both
    expected = Reader(source, rename=hub_name)
    found = list(hf_tensors(target))
    assert sorted(name for name, _ in found) == sorted(expected.tensors)
    assert [name for name, tensor in found if not torch.equal(tensor, expected[name])] == []


def test_vllm_reads_hugging_face_files_itself_and_ours_by_a_loader_of_its_registry(both: tuple[Path, Path]) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    source, target = both
    assert load_format(source) == "auto"
    loader = get_model_loader(LoadConfig(load_format=load_format(target)))
    assert type(loader).__name__ == "TorchDistLoader"


def test_what_is_missing_is_named_before_anything_is_loaded(both: tuple[Path, Path], tmp_path: Path) -> None:
    incomplete = shutil.copytree(both[1], tmp_path / "incomplete")
    stored = read_metadata(incomplete)
    del stored["vision.merger.linear_fc2.bias"]
    write_metadata(incomplete, stored)
    with pytest.raises(UserError, match=r"1 tensors are missing: visual\.merger\.mlp\.2\.bias"):
        next(hf_tensors(incomplete))


def test_verify_says_what_transformers_cannot_read(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--hf", str(both[1])]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is in Megatron's format, which transformers does not read" in message
