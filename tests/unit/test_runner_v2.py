"""vLLM runs another model runner on GPUs (V2) than where the system tests run (V1). What an engine relies on, asked of V2's own classes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eureka_megatron.rollout.engine import EngineOptions, hf_overrides

runner = pytest.importorskip("vllm.v1.worker.gpu.model_runner", reason="vLLM is not installed")


def test_the_encoder_cache_forgets_embeddings_of_old_weights() -> None:
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

    own = SimpleNamespace(encoder_cache=EncoderCache(), pooling_runner=None)
    own.encoder_cache.encoder_outputs["picture"] = torch.ones(2, 3)
    runner.GPUModelRunner.reset_encoder_cache(own)  # what `Engine.drop_caches` ends in
    assert len(own.encoder_cache) == 0
    assert callable(runner.GPUModelRunner.get_model)  # what a half-finished update is flushed through


def test_the_ban_and_the_temperature_do_not_touch_the_logits_that_are_reported() -> None:
    from vllm.config import ModelConfig
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    def nothing(*_: object) -> None:
        pass

    def ban(logits: torch.Tensor, _: object) -> torch.Tensor:
        logits[:, 1] = -torch.inf  # in place, as V2's own bias does
        return logits

    def halve(logits: torch.Tensor, *_: object) -> None:
        logits /= 2

    sampler = SimpleNamespace(
        needs_logits_processing=np.array([True]),
        logits_processors=[SimpleNamespace(apply=ban)],
        thinking_budget_state=SimpleNamespace(apply=nothing),
        sampling_states=SimpleNamespace(apply_temperature=halve, apply_min_p=nothing),
    )
    raw, index = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0])
    arguments = (raw, index, index, np.array([0]), index, index, index, np.array([1]))
    processed = Sampler.apply_sampling_params(sampler, *arguments, skip_top_k_top_p=True)
    assert processed.tolist() == [[0.5, -torch.inf, 2.0]]
    assert raw.tolist() == [[1.0, 2.0, 4.0]]
    assert ModelConfig.logprobs_mode == "raw_logprobs"


def test_the_output_layer_on_gpus_is_fp32_and_takes_a_scale(tiny_dir: Path) -> None:
    """A scale is how an engine samples at a temperature; of bf16 logits it would round a second time."""
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    options = EngineOptions(tiny_dir, max_model_tokens=100)
    config = ModelConfig(str(tiny_dir), dtype="bfloat16", hf_overrides=hf_overrides(options, 128, on_gpu=True))
    assert (config.dtype, config.head_dtype) == (torch.bfloat16, torch.float32)
    layer = SimpleNamespace(logits_as_input=True, soft_cap=None, scale=1 / 0.5)
    assert LogitsProcessor.forward(layer, None, torch.tensor([1.0, -3.0])).tolist() == [2.0, -6.0]


def test_bans_and_end_tokens_find_room() -> None:
    from vllm.v1.worker.gpu.sample import logit_bias

    assert logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS >= 5  # QwenVLConfig.vision_token_ids
    assert logit_bias.MAX_NUM_STOP_TOKEN_IDS >= 8
