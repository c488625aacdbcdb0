"""One vLLM engine: samples responses, scores given ones, takes new weights. Plain Python: Ray is in pool.py.

Decisions a reader may wonder about:

- Prompts go in as token ids with **one** placeholder a picture or video; vLLM expands them, and the expansion is compared with
  `Prompt.tokens_S` token by token. Expanded ids would be expanded again without an error.
- Frames of a video go in as they are, neither sampled nor resized again, with the rate that gives vLLM `Picture.seconds_per_grid` to the bit.
- The temperature is a scale of the model's logits, and sampling itself happens at 1: vLLM's `raw_logprobs`, before the ban below and before
  top-p, are then those of softmax(logits / T), which the trainer computes as well. Its own temperature would leave them at T = 1.
- On GPUs the output layer gives fp32, as the trainer's does; a scale would round bf16 logits a second time.
- Vision special tokens are banned by a logit bias of minus infinity (one indexed addition a step): a sampled `<|image_pad|>` would
  be taken for a picture by the next training pass.
- Every request has its own seed, made from the call's seed and the prompt's id: a response depends neither on which engine
  sampled it nor on its neighbours in the batch (up to floating-point noise).
- On GPUs vLLM runs its Model Runner V2, on CPUs (so in the tests) V1; what is used here is alike in both (tests/unit/test_runner_v2.py), and
  VLLM_USE_V2_MODEL_RUNNER=0 is the way back to V1.
- The engine runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): its caller is already a process of its own. So does the model, unless
  it is split over several workers (`tensor`), which vLLM then starts as processes. What touches the model is in worker.py either way.

vLLM is imported on construction only, after its environment variables are set. Left out: engines over several nodes.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch

from eureka_megatron.data.endings import response_ends
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config, tower_divides
from eureka_megatron.rollout.settings import EngineOptions, cpu_settings, gpu_settings, hf_overrides, set_environment
from eureka_megatron.rollout.weights import load_format
from eureka_megatron.rollout.worker import EXTENSION, Failure, shared_bytes
from eureka_megatron.sync.check import Fingerprint, check_announced, combine
from eureka_megatron.sync.source import SyncError, TensorMeta
from eureka_megatron.tracking.memory import held_memory
from eureka_megatron.types import Picture, Prompt, Rollout, Sampling


def request_seeds(prompts: Sequence[Prompt], seed: int, seen: Counter[str] | None = None) -> list[int]:
    """One seed a prompt, from `seed` and the prompt's id; the k-th occurrence of an id gets another. Leaves room for + n.

    seen: how often ids have come up before; counted on, so that parts of a list get the seeds that the whole would.
    """
    seen = Counter() if seen is None else seen
    seeds = []
    for prompt in prompts:
        digest = hashlib.blake2b(f"{seed}/{prompt.id}/{seen[prompt.id]}".encode(), digest_size=8).digest()
        seeds.append(int.from_bytes(digest) >> 2)
        seen[prompt.id] += 1
    return seeds


def collapse_placeholders(prompt: Prompt) -> list[int]:
    """Token ids with one placeholder a picture, from `tokens_S`, which has one for each vision embedding."""
    keep_S = np.ones(len(prompt.tokens_S), dtype=bool)
    for picture, offset in zip(prompt.pictures, prompt.picture_offsets, strict=True):
        keep_S[offset + 1 : offset + picture.units] = False
    return prompt.tokens_S[keep_S].tolist()


# Number, prompt, seed.
Work = tuple[int, Prompt, int]


class Engine:
    """Not safe for several threads. Construction takes some seconds and the memory of the weights and the KV cache."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.weight_version = options.weight_version
        self._failure: str | None = None  # why the weights are a mixture, and nothing may be served
        self._updating: int | None = None  # version of the update under way
        self._serving: dict[str, tuple[int, Prompt]] = {}  # what `serve` is at work on, by vLLM's names
        directory = Path(options.model)
        config = read_hf_config(directory)
        set_environment()
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from eureka_megatron.sync import ipc_transfer
        from eureka_megatron.sync.ray_transfer import register_backend

        _keep_pictures()
        on_gpu = torch.cuda.is_available()
        backend = ipc_transfer.BACKEND if options.sleeps and on_gpu else register_backend()
        self._llm = LLM(
            model=str(directory),
            load_format=load_format(directory),
            hf_overrides=hf_overrides(options, config.text_config.max_position_embeddings, on_gpu=on_gpu),
            dtype="float32" if options.dtype == "float32" else "bfloat16",
            max_model_len=options.max_model_tokens + 1,
            max_num_seqs=options.max_concurrent,
            seed=options.seed,
            mm_processor_kwargs={
                "images_kwargs": {"size": {"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels}},
                "videos_kwargs": {"do_resize": False, "do_sample_frames": False, "cap_pixels_per_frame": False},
            },
            mm_processor_cache_gb=1,
            tensor_parallel_size=options.tensor,
            distributed_executor_backend="uni" if options.tensor == 1 else "mp",
            worker_extension_cls=EXTENSION,
            # A tower that cannot be split is whole in every worker, and they share the pictures.
            mm_encoder_tp_mode="weights" if tower_divides(config.vision_config, options.tensor) else "data",
            weight_transfer_config=WeightTransferConfig(backend=backend),
            **(gpu_settings(options) if on_gpu else cpu_settings(options)),
        )
        self._pids = self._on_workers("pid")
        if options.tensor > 1:
            self._end_with_the_workers()
        self._llm.llm_engine.set_weight_version(str(options.weight_version))
        self._banned = config.vision_token_ids
        self._stop_ids = list(response_ends(directory, self._llm.get_tokenizer(), config).reasons)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        """n responses for each prompt, in order.

        seeds: one for each prompt, from `request_seeds`, so that splitting a call changes nothing; `sampling`'s own was used up there.
        A response ends with the end-of-turn token (kept, finish_reason "stop") or after max_tokens ("length"). Its log-probabilities are
        those of the policy at this temperature (at 0, greedy: of that at 1), whatever top_p leaves out.

        Raises UserError when a prompt is too long or vLLM expands its pictures to other tokens than `tokens_S`.
        """
        work: list[Work] = list(zip(range(len(prompts)), prompts, seeds, strict=True))
        found: dict[int, list[Rollout]] = {}
        while len(found) < len(prompts):
            found |= self.serve(work, sampling, math.inf)[1]
            work = []
        return [found[number] for number in range(len(prompts))]

    def serve(self, work: Sequence[Work], sampling: Sampling, seconds: float) -> tuple[int, dict[int, list[Rollout]]]:
        """Takes up more prompts, then samples until one of all it has is finished, or for so long. What is not finished goes on in the next call,
        also over a weight update. Arguments, responses and errors are those of `generate`; after an error nothing is at work any more.

        Returns:
            the weight version, and the n responses of each finished prompt by its number.
        """
        from vllm import RequestOutput

        self._require_whole_weights()
        if (
            work and not self._serving
        ):  # what is computed anew does not depend on what was asked before: a resumed run repeats it bit for bit
            self._llm.reset_prefix_cache()
        finished: dict[int, list[Rollout]] = {}
        until = time.monotonic() + seconds
        try:
            self._take_up(work, sampling)
            while self._serving and not finished and time.monotonic() < until:
                for output in self._llm.llm_engine.step():
                    assert isinstance(output, RequestOutput)
                    if output.request_id not in self._serving:  # abandoned
                        continue
                    number, prompt = self._serving.pop(output.request_id)
                    _check_expansion(prompt, output.prompt_token_ids or [], prompt.tokens_S)
                    samples = sorted(output.outputs, key=lambda sample: sample.index)
                    finished[number] = [self._rollout(sample) for sample in samples]
        except BaseException:
            self.abandon()
            raise
        return self.weight_version, finished

    def abandon(self) -> None:
        """Ends what `serve` has not finished."""
        self._llm.llm_engine.abort_request(list(self._serving))
        self._serving.clear()

    def _take_up(self, work: Sequence[Work], sampling: Sampling) -> None:
        from vllm import SamplingParams

        n, temperature = sampling["n"], sampling["temperature"]
        if temperature == 0 and n > 1:
            raise UserError(f"temperature 0 makes all {n} responses of a prompt equal: ask for n=1")
        if work:
            self._set_temperature(temperature)
        for number, prompt, seed in work:
            parameters = SamplingParams(
                n=n,
                temperature=float(temperature > 0),  # greedy, or of the scaled logits
                top_p=sampling["top_p"],
                max_tokens=self._room(prompt, sampling["max_tokens"]),
                seed=seed,
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,
                detokenize=False,  # token by token; `_rollout` does it once
                stop_token_ids=self._stop_ids,
                logit_bias=dict.fromkeys(self._banned, float("-inf")),
            )
            (request,) = self._llm.enqueue([self._request(prompt)], parameters, use_tqdm=False)
            # Outputs go by the name before vLLM's addition.
            self._serving[request.rpartition("-")[0]] = (number, prompt)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[np.ndarray], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """float32 [R] for each pair: log-probabilities of given response tokens under the current weights at this temperature."""
        from vllm import SamplingParams

        self._require_whole_weights()
        self._set_temperature(temperature)
        parameters = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        requests = []
        for prompt, tokens_R in zip(prompts, responses, strict=True):
            if forbidden := self._banned.intersection(tokens_R.tolist()):
                raise UserError(
                    f"a response to {prompt.id} holds vision special tokens {sorted(forbidden)}: not a response"
                )
            self._room(prompt, len(tokens_R), exactly=True)
            requests.append(self._request(prompt, tokens_R.tolist()))
        scores = []
        for prompt, tokens_R, output in zip(prompts, responses, self._run(requests, parameters), strict=True):
            _check_expansion(prompt, output.prompt_token_ids, np.concatenate([prompt.tokens_S, tokens_R]))
            flat = output.prompt_logprobs
            starts = flat.start_indices[len(flat) - len(tokens_R) :]
            scores.append(np.array([flat.logprobs[start] for start in starts], dtype=np.float32))
        return scores

    # ---- weights ----------------------------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer group (NCCL), worker r as rank_offset + r; the Ray transport needs none."""
        self._on_workers("join", init_info)

    def start_weight_update(self, metadata: Sequence[TensorMeta], version: int, unchanged: Sequence[str] = ()) -> None:
        """Compare the announced tensors with the model's own, then make ready to load. `unchanged` ones stay as they are.

        Raises SyncError naming missing, unexpected and ill-shaped tensors; the engine then goes on serving what it has.
        """
        if self._updating is not None:
            raise SyncError(f"weight update to version {version} begins while that to {self._updating} is not finished")
        check_announced(metadata, self._expected, unchanged)
        self._updating = version
        try:
            self._on_workers("start", metadata, version, unchanged, self._failure is not None)
        except BaseException:
            self.abort_weight_update("could not start")
            raise

    def update_weights(self, update_info: dict[str, Any], buffer: np.ndarray | None = None) -> None:
        """Load a part. `buffer` is separate because Ray hands it over without a copy only as an argument of its own."""
        if buffer is None:
            self._on_workers("load", update_info)
        elif self.options.tensor == 1:
            self._on_workers("load", update_info | {"buffer": buffer})
        else:
            with shared_bytes(buffer) as shared:
                self._on_workers("load", update_info | {"buffer": shared})

    def finish_weight_update(self) -> int:
        """Finish, drop every cache of the old weights, take the new version. Returns the number of tensors loaded.

        Raises SyncError when fewer or other tensors came than were announced; the engine serves nothing until it is mended.
        """
        if self._updating is None:
            raise SyncError("finish_weight_update without start_weight_update")
        try:
            received = max(self._on_workers("check_complete"))  # of all workers, before any puts them in place
            self._on_workers("finish")
        except BaseException as error:
            self.abort_weight_update(str(error))
            raise
        version, self._updating = self._updating, None
        self.drop_caches()
        self._failure, self.weight_version = None, version
        self._llm.llm_engine.set_weight_version(str(version))
        return received

    def abort_weight_update(self, reason: str) -> None:
        """End an update that cannot be finished. With nothing loaded the old weights are whole; otherwise serve nothing."""
        if self._updating is None:
            return
        version, self._updating = self._updating, None
        before = self._failure
        self._failure = f"weight update to version {version} failed half-way ({reason})"
        if not max(self._on_workers("abort")):
            self._failure = before

    def drop_caches(self) -> None:
        """Everything computed from the old weights: KV blocks, those of unfinished responses too, processed pictures, vision embeddings.

        The last is the one vLLM's own `reset_prefix_cache` leaves: the same picture would go on with the old tower's embeddings.
        """
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def sleep(self) -> None:
        """Free what sampling alone needs: the KV cache; on GPUs the weights too, which wait in host memory (vLLM's level 1)."""
        self._llm.sleep(level=1)
        if not torch.cuda.is_available():
            self._on_workers("drop_kv_cache")

    def wake(self, *parts: Literal["weights", "kv_cache"]) -> None:
        """Take these parts back. Weights can be updated before the KV cache is there; sampling needs both."""
        if "kv_cache" in parts and not torch.cuda.is_available():
            self._on_workers("restore_kv_cache")
        self._llm.wake_up(tags=list(parts))

    def checksums(self) -> dict[str, Fingerprint]:
        """Of every weight the engine computes with, read back from its kernels, by Hugging Face name (hub naming)."""
        return combine(self._on_workers("pieces"))

    def status(self) -> dict[str, Any]:
        """`{"pid", "workers", "weight_version", "failure", "memory"}`; also the way to wait until a remote engine is up."""
        return {
            "pid": os.getpid(),
            "workers": self._pids,  # with one worker: that of the engine itself
            "memory": held_memory(self._pids),
            "weight_version": self.weight_version,
            "failure": self._failure,
        }

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        """A method of `EngineWorker` in every worker at once. → the answers, by rank; raises the first worker's error."""
        answers = self._llm.collective_rpc("on_worker", args=(method, *arguments))
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error
        return answers

    def _end_with_the_workers(self) -> None:
        """End this process when one of the workers' ends. An engine is an actor: the pool sees it die, and replaces it."""
        executor = self._llm.llm_engine.model_executor
        sentinels = [worker.proc.sentinel for worker in executor.workers]

        def watch() -> None:
            wait(sentinels)
            if executor.is_failed or not getattr(executor, "shutting_down", False):  # not at an end of its own
                os._exit(1)

        Thread(target=watch, name="workers of the engine", daemon=True).start()

    @cached_property
    def _expected(self) -> dict[str, TensorMeta]:
        return self._on_workers("expected")[0]

    def _set_temperature(self, temperature: float) -> None:
        self._on_workers("scale_logits", 1.0 / (temperature or 1.0))

    def _require_whole_weights(self) -> None:
        if self._updating is not None:
            raise SyncError(f"the engine is in the middle of the weight update to version {self._updating}")
        if self._failure is not None:
            raise SyncError(f"the engine's weights are a mixture: {self._failure}; send all weights again")

    def _room(self, prompt: Prompt, wanted: int, exactly: bool = False) -> int:
        room = self.options.max_model_tokens - len(prompt.tokens_S)
        if room < (wanted if exactly else 1):
            raise UserError(
                f"prompt {_named(prompt)} has {len(prompt.tokens_S)} tokens and "
                f"leaves no room for a response within rollout.max_model_tokens={self.options.max_model_tokens}"
            )
        return min(wanted, room)

    @staticmethod
    def _request(prompt: Prompt, response: Sequence[int] = ()) -> Any:
        request: dict[str, Any] = {"prompt_token_ids": [*collapse_placeholders(prompt), *response]}
        images = [picture.image for picture in prompt.pictures if not picture.is_video]
        videos = [_video_item(picture) for picture in prompt.pictures if picture.is_video]
        if prompt.pictures:
            request["multi_modal_data"] = {k: v for k, v in (("image", images), ("video", videos)) if v}
        return request

    def _run(self, requests: list[Any], parameters: Any) -> list[Any]:
        return self._llm.generate(requests, parameters, use_tqdm=False) if requests else []

    def _rollout(self, sample: Any) -> Rollout:
        flat = sample.logprobs
        chosen = [flat.token_ids[start] for start in flat.start_indices]
        assert chosen == list(sample.token_ids), "log-probabilities are not those of the sampled tokens"
        first, *later = sample.weight_versions
        said = chosen[:-1] if sample.finish_reason == "stop" else chosen  # the end is no text
        text = self._llm.get_tokenizer().decode(said, skip_special_tokens=True)
        return Rollout(
            tokens_R=np.array(sample.token_ids, dtype=np.int64),
            logprobs_R=np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32),
            text=text.rstrip("\ufffd"),  # a character that was cut off
            finish_reason=sample.finish_reason,
            weight_version=int(first.version),
            switches=tuple((span.start, int(span.version)) for span in later),
        )


def _video_item(picture: Picture) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames and metadata as vLLM's input processor wants them; it works out 2 / fps again, the seconds of a time step."""
    assert picture.frames is not None, "a video"
    assert picture.seconds_per_grid is not None, "a video"
    count = len(picture.frames)
    fps = count / picture.grid_thw[0] / picture.seconds_per_grid
    return picture.frames, {
        "fps": fps,
        "duration": count / fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "eureka",
    }


def _named(prompt: Prompt) -> str:
    return prompt.id + (f" ({prompt.origin})" if prompt.origin else "")


def _check_expansion(prompt: Prompt, found: Sequence[int], expected_S: np.ndarray) -> None:
    if len(found) != len(expected_S):
        raise UserError(
            f"prompt {_named(prompt)}: vLLM expands it to {len(found)} tokens, "
            f"tokens_S has {len(expected_S)}; pictures must be resized with the engine's min_pixels and max_pixels"
        )
    if not np.array_equal(np.asarray(found), expected_S):
        first = int(np.flatnonzero(np.asarray(found) != expected_S)[0])
        raise UserError(
            f"prompt {prompt.id}: vLLM has token {found[first]} at {first}, tokens_S has {expected_S[first]}"
        )


def _keep_pictures() -> None:
    """Have vLLM's workers keep the pixels of every request's pictures; once in the process of the scheduler.

    vLLM 0.32 leaves them out where the request begins behind cached blocks that hold the picture. Where it is computed anew, after a weight update or
    because memory was short, there would be nothing to encode, and the engine would die. Costs workers in processes of their own (`tensor`) a copy a response.
    """
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = lambda features, *_, **__: features
