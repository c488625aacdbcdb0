"""What `eureka verify` holds figures against depends on where and in what both sides compute; and what it keeps, it keeps on the host."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eureka_megatron.layout import Execution
from eureka_megatron.verify import engine, made_up_samples
from eureka_megatron.verify.job import Job
from eureka_megatron.verify.measure import on_host


def report_at(gap: float, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """As if engine and model were `gap` apart on every token."""
    found = {"text": {"max": gap, "mean": gap, "tokens": 1}}
    monkeypatch.setattr(engine, "differences", lambda *_: found)
    monkeypatch.setattr(engine, "engine_logprobs", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    return engine.engine_report(Job("hf", "reference", (), execution=Execution(dtype=dtype)), [])


@pytest.mark.parametrize(
    ("dtype", "device", "good", "bad"),
    [
        ("float32", "cpu", 9e-6, 2e-5),
        ("float32", "cuda", 9e-6, 1e-3),  # 1e-3: what TF32 would be
        ("bfloat16", "cpu", 4e-3, 5e-2),
        ("bfloat16", "cuda", 4e-3, 5e-2),
    ],
)
def test_bars_of_an_engine_depend_on_device_and_dtype(
    dtype: str, device: str, good: float, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report_at(good, dtype, device, monkeypatch)["passed"]
    report = report_at(bad, dtype, device, monkeypatch)
    assert not report["passed"]
    assert (report["device"], report["dtype"]) == (device, dtype)


class Started(Exception):
    """An engine would load vLLM now."""


def test_attention_in_fp32_is_told_to_multiply_in_ieee_precision(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's variable for products whose precision the kernel leaves open, as vLLM's attention kernels all do."""
    from triton import knobs
    from vllm.v1.attention import ops

    from eureka_megatron.rollout import engine as rollout_engine

    for kernel in ("triton_unified_attention", "triton_prefill_attention"):
        source = (Path(ops.__path__[0]) / f"{kernel}.py").read_text()
        assert "tl.dot(" in source
        assert not re.search(r"input_precision|allow_tf32", source)

    def begin(*_: object) -> None:
        raise Started

    monkeypatch.setattr(rollout_engine, "Engine", begin)
    samples = made_up_samples(tiny_dir, pictures=((),))
    monkeypatch.setenv("TRITON_F32_DEFAULT", "")  # so that it is unset again after the test
    for already, dtype, expected in ((None, "bfloat16", None), (None, "float32", "ieee"), ("tf32", "float32", "tf32")):
        monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
        if already:
            monkeypatch.setenv("TRITON_F32_DEFAULT", already)
        with pytest.raises(Started):
            engine.engine_logprobs(tiny_dir, samples, dtype)
        assert knobs.language.fp32_default == expected


def test_copies_of_the_weights_stand_on_the_host() -> None:
    """The tensors are on a GPU as far as torch knows; the model in fp32 is larger than what is free there."""
    with FakeTensorMode(), torch.no_grad():
        weights = [("a", torch.empty(4, 4, device="cuda")), ("b", None), ("c", torch.empty(2, device="cuda"))]
        found = on_host(weights)
        assert {name: tensor.device.type for name, tensor in found.items()} == {"a": "cpu", "c": "cpu"}


def test_copies_of_the_weights_do_not_follow_them() -> None:
    weight = torch.zeros(3)
    found = on_host([("a", weight)])
    weight += 1
    assert found["a"].tolist() == [0, 0, 0]
