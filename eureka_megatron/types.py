"""Records that cross the borders between modules.

Shape suffixes: S tokens of one sample, R response tokens, T tokens of one packed row, I pictures, P patches, D values of a
patch, U merge units (one vision embedding each; 2×2 patches for Qwen2.5-VL), W windows, F frames, Q sequences of a row.
All records are frozen; arrays in them are never written to.

Alignment: in `Sample` and `Rollout` a value at index i belongs to **token i**. In `MicroBatch` it belongs to the **prediction
made at row t**, that is to the token `labels_T[t]` which follows it; `packing` does that shift once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One picture or video, processed once and shared by all samples that show it.

    Everything per patch is in **window order**: the order in which windowed attention wants the patches. Because patch
    embedding, rotary embedding and the merger work patch by patch (or merge unit by merge unit), permuting here means that
    the model never permutes; `unit_order_U` says where each embedding belongs in reading order.

    Two frames of a video make one step of its time axis (`temporal_patch_size`), and what is called a frame below is such a step.

    Example: an 84×84 picture has `grid_thw=(1, 6, 6)`, 36 patches, 9 merge units, `window_lengths=[36]`,
    `frame_lengths=[36]`. Six 84×84 frames at 2 a second: `grid_thw=(3, 6, 6)`, 108 patches, `frame_lengths=[36, 36, 36]`,
    `seconds_per_grid=1.0`.
    """

    key: str  # content hash of pixels and grid: equal keys mean equal features
    image: Image | None  # RGB, already resized to the grid; what the rollout engine gets. None for a video
    grid_thw: tuple[int, int, int]  # patches in time, height, width
    patches_PD: torch.Tensor  # float32 [patches, channels · temporal patch · patch²]
    coordinates_P2: np.ndarray  # int64, (row, column) of each patch, for the rotary embedding
    # int64: the unit at place u of the window order is unit `unit_order_U[u]` in reading order
    unit_order_U: np.ndarray
    window_lengths_W: np.ndarray  # int64: patches in each attention window; sums to P
    frame_lengths_F: np.ndarray  # int64: patches in each frame (full-attention blocks); sums to P
    # uint8 RGB [frames, height, width, 3] of a video, resized; what the rollout engine gets
    frames: np.ndarray | None = None
    # of a video: between two steps of the time axis, rounded as the engine has it
    seconds_per_grid: float | None = None

    @property
    def is_video(self) -> bool:
        return self.seconds_per_grid is not None

    @property
    def patches(self) -> int:
        """P, also of a picture whose patches stay elsewhere."""
        return len(self.coordinates_P2)

    @property
    def units(self) -> int:
        """Vision embeddings, hence placeholder tokens, of this picture or video."""
        return len(self.unit_order_U)

    def without_patches(self) -> Picture:
        """The same to look at, but nothing to train on."""
        return replace(self, patches_PD=self.patches_PD[:0].clone(), coordinates_P2=self.coordinates_P2[:0].copy())


@dataclass(frozen=True)
class Prompt:
    """A question, ready for rollouts and for training.

    Example: id "count-0001", text "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>How many circles? …",
    tokens_S with 9 `<|image_pad|>` where text has one, picture_offsets (4,), answer "3".
    """

    id: str
    text: str  # chat template applied; one placeholder a picture or video (the rollout engine expands it itself)
    answer: str
    tokens_S: np.ndarray  # int64, placeholders expanded
    positions_3S: np.ndarray  # int64 [3, S]: mrope positions in time, height, width
    pictures: tuple[Picture, ...] = ()
    picture_offsets: tuple[int, ...] = ()  # index in tokens_S of each picture's first placeholder
    origin: str = ""  # "file:line", for messages

    @property
    def nbytes(self) -> int:
        """About how much memory it takes: pictures above all, and of these the patches."""
        pixels = 0
        for picture in self.pictures:
            pixels += 3 * picture.image.width * picture.image.height if picture.image is not None else 0
            pixels += picture.frames.nbytes if picture.frames is not None else 0
        patches = sum(picture.patches_PD.nbytes for picture in self.pictures)
        return patches + pixels + 4 * self.tokens_S.nbytes + 2 * len(self.text)

    def without_patches(self) -> Prompt:
        """As a rollout engine needs it: patches weigh eight times what the picture does, and the engine makes its own."""
        return replace(self, pictures=tuple(picture.without_patches() for picture in self.pictures))

    @property
    def next_position(self) -> int:
        """The position, equal in all three axes, of the first response token."""
        return int(self.positions_3S.max()) + 1


class Sampling(TypedDict):
    """How responses are sampled: the keywords of `RolloutPool.generate`."""

    # responses of each prompt
    n: int
    # 0: greedy
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Example: tokens_R [17, 41, 2], logprobs_R [-0.1, -1.3, -0.0], finish_reason "stop"."""

    tokens_R: np.ndarray  # int64, with the end token when finish_reason is "stop"
    logprobs_R: np.ndarray  # float32: log μ of each sampled token at the temperature of sampling
    text: str  # decoded without special tokens
    finish_reason: str  # "stop" | "length"
    weight_version: int  # of the weights that sampled it, or its beginning
    rewards: dict[str, float] = field(default_factory=dict)  # "accuracy", "format", "total", …; empty until judged
    # (first token, weight version) of each later part, of a response that was carried over a weight update: ((120, 7), (300, 8))
    switches: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Group:
    """The n rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    def rewards(self, name: str) -> np.ndarray:
        """float64 [N]: one reward component over the group."""
        return np.array([rollout.rewards[name] for rollout in self.rollouts], dtype=np.float64)


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from. A value at index i belongs to token i; only where mask_S is 1 does it matter."""

    tokens_S: np.ndarray  # int64
    positions_3S: np.ndarray  # int64 [3, S]
    mask_S: np.ndarray  # float32: 1 on tokens whose log-probability is learned (the response)
    advantages_S: np.ndarray  # float32; all ones for supervised training
    rollout_logprobs_S: np.ndarray | None = None  # float32: log μ
    old_logprobs_S: np.ndarray | None = None  # float32: log π_old of the trainer before the first update
    ref_logprobs_S: np.ndarray | None = None  # float32: log π_ref, only when a reference is used
    pictures: tuple[Picture, ...] = ()
    picture_offsets: tuple[int, ...] = ()
    weight_lag: int = 0  # updates of the weights since rollout_logprobs_S were taken; 0: they must equal the trainer's

    def __len__(self) -> int:
        return len(self.tokens_S)


class BeganWith(NamedTuple):
    """What the weights that a step began with think of a sample; index 0 means nothing."""

    logprobs_S: np.ndarray  # float32
    entropy_S: np.ndarray | None = (
        None  # float32, in nats: of the distribution that each token was drawn from; None: not computed
    )


@dataclass(frozen=True)
class Batch:
    """The samples of one rollout step. `updates[k]` lists the indices of those of optimizer step k."""

    samples: tuple[Sample, ...]
    updates: tuple[tuple[int, ...], ...]
    # Optimizer steps that the learning rate's schedule has behind it; None: as many as were made. Steps that the online filter left
    # short make fewer than planned, and a schedule that counted only those would never reach its end.
    scheduled: int | None = None

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Batch:
        """One update on these samples."""
        samples = tuple(samples)
        return cls(samples, (tuple(range(len(samples))),))


@dataclass(frozen=True)
class VisionBatch:
    """All distinct pictures of one micro-batch for the tower; window order, as in `Picture`.

    When tensor-parallel ranks share the pictures (`vision_parallel: data`), patches, coordinates, windows and frames are those of
    this rank's pictures alone, and the U embeddings stand rank after rank.

    What is large, one of `patches_PD`, `hidden_PH` and `units_UO`, is on the host one tensor a picture, shared with the samples: it is laid
    end to end on its way to the device (`train.step.to_device`), one micro-batch at a time.
    """

    coordinates_P2: torch.Tensor  # int64
    cu_windows: torch.Tensor  # int32 [W+1]: cumulative patches, windowed attention
    cu_frames: torch.Tensor  # int32 [F+1]: cumulative patches, full attention
    units: int  # U: vision embeddings of the distinct pictures
    source_E: torch.Tensor  # int64: which of the U embeddings …
    placement_E: torch.Tensor  # int64: … goes to which row of the packed sequence (a shared picture has several rows)
    patches_PD: torch.Tensor | tuple[torch.Tensor, ...] | None = None  # float32; in the tower's dtype on the device
    # Of a frozen tower, computed once for a whole rollout step, in place of the patches: what leaves its blocks …
    hidden_PH: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    # … or, when the merger is frozen too, the embeddings themselves.
    units_UO: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    # Embeddings each tensor-parallel rank computes; None: every rank all of them.
    units_R: tuple[int, ...] | None = None
    # Under context parallelism, int64 [2, L]: which of the U embeddings goes to which of this rank's own rows.
    shown_2L: torch.Tensor | None = None
    # Patches of each window and frame, known on the host: asking the device would stall it. None: it is asked.
    windows: tuple[int, ...] | None = None
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ContextShare:
    """Which rows of a packed row one context-parallel rank computes.

    Every sequence is cut into 2·size chunks; rank r takes chunks r and 2·size − 1 − r, so that causal attention costs all the same.
    Example: two ranks, one sequence of 8 tokens: rank 0 has rows_t [0, 1, 6, 7]; order_T is [0, 1, 4, 5, 6, 7, 2, 3].
    """

    rank: int
    size: int
    rows_t: torch.Tensor  # int64 [T / size]: this rank's rows
    order_T: torch.Tensor  # int64: where each row stands when the ranks' rows are laid end to end
    places_T: np.ndarray | None = None  # the same on the host, which finds the pictures' rows by it


@dataclass(frozen=True)
class MicroBatch:
    """Several samples packed into one row of T tokens; each attends only within itself.

    Samples may share the rows of their prompt (train.packing): it then is a segment of its own, and what follows it in each sample another,
    which sees it. T is a multiple of the alignment asked of `packing` (tensor-parallel size under sequence parallelism). Padding at the end is a
    sequence of its own with mask 0 and `sequence_ids_T` −1. Under context parallelism every sequence, too, is padded, to a multiple
    of 2 · ranks; all fields are those of the whole row, on every rank, and `context` says which rows are this rank's.
    """

    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64: the token that follows; 0 at the last row of each sequence, where mask_T is 0
    positions_3T: torch.Tensor  # int64 [3, T]
    cu_seqlens: torch.Tensor  # int32 [Q+1], padding included
    segments: tuple[int, ...]  # tokens of each segment, padding included: what cu_seqlens adds up, on the host
    # of each sample, in order: (first row, rows) of its pieces, padding not included
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    mask_T: torch.Tensor  # float32
    sequence_ids_T: torch.Tensor  # int64: index of the sample in this micro-batch; −1 on padding and shared prompts
    has_image_T: torch.Tensor  # bool: the sample shows a picture
    advantages_T: torch.Tensor  # float32
    old_logprobs_T: torch.Tensor | None
    rollout_logprobs_T: torch.Tensor | None
    ref_logprobs_T: torch.Tensor | None
    vision: VisionBatch | None
    sample_indices: tuple[int, ...] = ()  # which samples of the batch, in order
    context: ContextShare | None = None
    # (first row, rows) of the prompt that each segment sees besides its own rows, (0, 0): none; empty: no prompt is shared
    prefixes: tuple[tuple[int, int], ...] = ()
    # float32: of each prediction by the weights that gave old_logprobs_T, in nats, where these were computed here; to be looked at
    entropy_T: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.tokens_T)
