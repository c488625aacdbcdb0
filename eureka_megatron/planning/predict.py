"""Seconds of a rollout step, by roofline: what a rank's load takes on a GPU, and what the engines' work takes.

What is assumed beside the rates of hardware.py:

- matrix products, attention, other operations and collectives follow one another; nothing hides anything (the trainer overlaps none of them)
- a pipeline's stages wait for the slowest kind, and (stages − 1) / virtual_pipeline micro-batches for filling and draining, in each update
- rows are filled evenly; the costs of a row are in proportion to its tokens, attention to what a token sees on average, too
- responses to one prompt share its rows and its picture (training.share_prompts); what limits memory is a row of samples that share nothing
- old log-probabilities are a forward pass more for all updates of a step but the first, those of a reference for all
- responses' lengths spread evenly between 0 and twice their mean; engines read weights and cache once a decoding step and prefill a prompt once
- split, in turn: rollout, train and sync follow one another; with training.async_steps a step lasts as long as the longer of rollout and train + sync
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from eureka_megatron.config import RunConfig
from eureka_megatron.gpus import Gpu
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.models.qwen2_5_vl.operations import text_parameters, tower_parameters
from eureka_megatron.planning import hardware
from eureka_megatron.planning.hardware import GIB
from eureka_megatron.planning.load import Load, Shape, with_tower


@dataclass(frozen=True)
class Work:
    """What a rollout step consists of. Lengths are means, in tokens."""

    prompts: int
    samples: int  # of each prompt
    responses_per_update: int
    prompt_tokens: int
    response_tokens: int
    max_response_tokens: int
    longest: int  # prompt and response at most
    pixels: int
    steps: int
    frozen_tower: bool
    reference: bool
    asynchronous: bool
    share_prompts: bool = True

    @property
    def rows_of_prompt(self) -> float:
        """Tokens that a prompt and its responses take up."""
        prompts = 1 if self.share_prompts else self.samples
        return prompts * self.prompt_tokens + self.samples * self.response_tokens

    @property
    def keys_of_token(self) -> float:
        """How many tokens each of those sees on average."""
        prompt, response = self.prompt_tokens, self.response_tokens
        of_prompt = prompt**2 / 2 * (1 if self.share_prompts else self.samples)
        return (of_prompt + self.samples * (prompt * response + response**2 / 2)) / self.rows_of_prompt

    @property
    def updates(self) -> float:
        return self.responses / self.responses_per_update

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def sample_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @classmethod
    def of(cls, config: RunConfig, prompt_tokens: int, response_tokens: int, frozen_tower: bool) -> Work:
        training, rollout = config.training, config.rollout
        return cls(
            prompts=training.prompts_per_step,
            samples=rollout.samples_per_prompt,
            responses_per_update=training.responses_per_update,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            max_response_tokens=rollout.max_response_tokens,
            longest=config.data.max_prompt_tokens + rollout.max_response_tokens,
            pixels=config.data.max_pixels,
            steps=training.steps,
            frozen_tower=frozen_tower,
            reference=config.algorithm.kl_coefficient > 0,
            asynchronous=training.async_steps > 0,
            share_prompts=training.share_prompts,
        )


@dataclass(frozen=True)
class Engines:
    """Rollout engines on a GPU. Example: Engines(count=8, tensor=1, memory=0.8, colocated=True)."""

    count: int
    tensor: int
    memory: float  # share of the GPU, rollout.gpu_memory_utilization
    colocated: bool

    def cache_tokens(self, config: QwenVLConfig, gpu: Gpu) -> int:
        """Of an engine's KV cache; below 1 where weights leave no room."""
        room = gpu.memory * GIB * self.memory - self.weights(config) - hardware.ENGINE * GIB
        return int(room // self.cache_of_token(config))

    def weights(self, config: QwenVLConfig) -> float:
        """Bytes on each GPU."""
        return 2 * (text_parameters(config) + tower_parameters(config)) / self.tensor

    def cache_of_token(self, config: QwenVLConfig) -> float:
        """Bytes on each GPU; a head of keys and values is on one worker, or copied where there are fewer heads than workers."""
        text = config.text_config
        return 4 * text.num_hidden_layers * max(text.num_key_value_heads / self.tensor, 1) * text.head_dim


def passes_seconds(load: Load, shape: Shape, work: Work, gpu: Gpu, row_tokens: float) -> dict[str, float]:
    """Of one micro-batch of so many tokens on one rank."""
    full = row_tokens / shape.tokens
    longest = shape.tokens / shape.samples
    once = work.frozen_tower or work.share_prompts  # a prompt's picture is seen once, however many responses there are
    load = with_tower(load, longest * (1 if once else work.samples) / work.rows_of_prompt)
    shorter = work.keys_of_token / (longest / 2)  # attention of shorter samples is cheaper
    matrix = gpu.matrix * 1e12
    passes = 4 if shape.recompute == "full" else 3  # of which one is forward
    forwards = 1 + (max(0.0, 1 - 1 / work.updates) + work.reference) / passes
    return {
        "linears": (load.linears * forwards + load.vision) * full / (matrix * hardware.MATRIX),
        "attention": load.attention * forwards * full * shorter / (matrix * hardware.ATTENTION),
        "other operations": load.moved * forwards * full / (gpu.memory_rate * 1e9 * hardware.MEMORY),
        "tensor and context": (load.tensor / gpu.link + load.context / gpu.network)
        * forwards
        * full
        / 1e9
        / hardware.LINKS,
        "pipeline": load.pipeline * full / (gpu.network * 1e9 * hardware.LINKS),
    }


def train_seconds(loads: Sequence[Load], shape: Shape, work: Work, gpu: Gpu) -> dict[str, float]:
    """All updates of a rollout step, and the log-probabilities that they need beforehand."""
    layout = shape.layout
    updates = work.updates
    tokens = work.responses_per_update / work.samples * work.rows_of_prompt / layout.data
    rows = _rows(tokens, shape.tokens, layout)
    by_stage = [passes_seconds(load, shape, work, gpu, tokens / rows) for load in loads]
    slowest = max(by_stage, key=lambda parts: sum(parts.values()))
    found = {name: updates * rows * seconds for name, seconds in slowest.items()}
    filling = (layout.pipeline - 1) / layout.virtual_pipeline
    found["pipeline"] += updates * filling * sum(slowest.values())
    data = max(load.data for load in loads) / (_data_link(layout, gpu) * 1e9 * hardware.LINKS)
    moved = max(load.moved_by_update for load in loads) / (gpu.memory_rate * 1e9 * hardware.MEMORY)
    found["update"] = updates * (data + moved)
    return found


def _rows(tokens: float, limit: int, layout: Layout) -> int:
    rows = max(1, ceil(tokens / limit))
    return ceil(rows / layout.pipeline) * layout.pipeline if layout.virtual_pipeline > 1 else rows


def _data_link(layout: Layout, gpu: Gpu) -> float:
    """Data-parallel neighbours share a node only while tensor × context × data fit there."""
    return gpu.link if layout.tensor * layout.context * layout.data <= 8 and layout.pipeline == 1 else gpu.network


def rollout_seconds(config: QwenVLConfig, engines: Engines, work: Work, gpu: Gpu, max_concurrent: int) -> float:
    """Prefill and decoding of a rollout step."""
    memory = gpu.memory_rate * 1e9 * hardware.MEMORY
    cache = engines.cache_of_token(config)
    room = engines.cache_tokens(config, gpu) / work.sample_tokens
    own = work.responses / engines.count
    batch = max(1.0, min(own, room, max_concurrent))
    tail = min(2 * work.response_tokens, work.max_response_tokens)
    steps = max(own * work.response_tokens / batch + tail / 2, tail)
    running = min(batch, own * work.response_tokens / steps)
    latency = hardware.DECODE_OVERHEAD
    if engines.tensor > 1:
        latency += 2 * config.text_config.num_hidden_layers * hardware.TENSOR_LATENCY
    step = (engines.weights(config) + running * work.sample_tokens * cache) / memory + latency
    operations = 2 * text_parameters(config) * work.prompts * work.prompt_tokens / engines.count / engines.tensor
    return steps * step + operations / (gpu.matrix * 1e12 * hardware.MATRIX)


def sync_seconds(config: QwenVLConfig, layout: Layout, engines: Engines, gpu: Gpu, frozen_tower: bool) -> float:
    """Shards gathered tensor by tensor, then handed over: by NCCL to other GPUs, or within each GPU."""
    learning = 2 * (text_parameters(config) + (0 if frozen_tower else tower_parameters(config)))
    gathered = (gpu.link if layout.tensor * layout.pipeline <= 8 else gpu.network) * 1e9 * hardware.LINKS
    handed = (gpu.memory_rate if engines.colocated else gpu.network) * 1e9 * hardware.LINKS
    return learning / gathered * (layout.tensor * layout.pipeline > 1) + learning / handed


def switch_seconds(config: QwenVLConfig, loads: Sequence[Load], engines: Engines, gpu: Gpu) -> float:
    """Colocated: the optimizer's state to host memory and back, the engine's weights back from there."""
    if not engines.colocated:
        return 0.0
    moved = 2 * max(load.optimizer for load in loads) + engines.weights(config)
    return moved / (gpu.host * 1e9 * hardware.LINKS)
