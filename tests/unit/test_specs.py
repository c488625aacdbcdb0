"""Which backend is refused where, and what FP8 asks of widths and rows. Transformer Engine itself runs in tests/gpu."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from eureka_megatron.config import make_config
from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, read_hf_config
from eureka_megatron.models.qwen2_5_vl.specs import check_backend
from eureka_megatron.models.qwen2_5_vl.transformer_config import fp8_rows, text_transformer_config
from eureka_megatron.parallel.runtime import Axis, Parallel
from eureka_megatron.train.packing import row_layout

TE = Execution(dtype="bfloat16", backend="te")


@pytest.fixture(scope="module")
def hf_config(tiny_dir: Path) -> QwenVLConfig:
    return read_hf_config(tiny_dir)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed here"
)
def test_without_transformer_engine_the_error_says_what_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        check_backend(TE, Parallel())
    assert "\n" not in str(caught.value)
    assert "make install-te" in str(caught.value)


def test_transformer_engine_wants_bfloat16() -> None:
    with pytest.raises(ValueError, match=r"backend 'te' computes in bfloat16"):
        Execution(backend="te")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"backend": "te", "dtype": "float32"}, "computes in bfloat16"),
        ({"fp8": "hybrid"}, "needs backend 'te'"),
        ({"backend": "te", "fp8": "e5m2"}, r"model\.fp8"),
    ],
)
def test_configurations_that_cannot_run_are_refused(model: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config({"model": {"path": "m", **model}, "data": {"train": "d"}})


def test_fp8_wants_widths_of_sixteen(hf_config: QwenVLConfig) -> None:
    found = text_transformer_config(
        hf_config, Parallel(), TE.model_copy(update={"fp8": "hybrid", "fp8_recipe": "tensorwise"})
    )
    assert (found.fp8, found.fp8_recipe) == ("hybrid", "tensorwise")
    narrow = replace(hf_config, text_config=replace(hf_config.text_config, intermediate_size=264))
    with pytest.raises(ConfigError, match=r"intermediate_size / parallel\.tensor=264"):
        text_transformer_config(narrow, Parallel(), TE.model_copy(update={"fp8": "hybrid"}))


@pytest.mark.parametrize(
    ("recipe", "sequence_parallel", "context", "align"),
    [
        ("delayed", False, 1, 16),
        ("delayed", True, 1, 16 * 4),
        ("tensorwise", True, 2, 16 * 4 * 2),
        ("blockwise", False, 1, 16),
        ("blockwise", True, 1, 128 * 4),
    ],
)
def test_rows_of_every_rank_fit_fp8_kernels(recipe: str, sequence_parallel: bool, context: int, align: int) -> None:
    layout = Layout(tensor=4, context=context, sequence_parallel=sequence_parallel)
    parallel = Parallel(tensor=Axis(0, 4), context=Axis(0, context), layout=layout)
    narrow = TE.model_copy(update={"fp8": "hybrid", "fp8_recipe": recipe})
    assert row_layout(parallel, multiple=fp8_rows(narrow, layout)).align == align
    assert fp8_rows(narrow.model_copy(update={"fp8": "none"}), layout) == 1
