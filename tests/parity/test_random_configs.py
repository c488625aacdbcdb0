"""Drawn configurations against transformers: logits, loss, every gradient, unclipped norm, SGD step, weights back.

The other parity tests fix a shape and walk the layouts; this one fixes the layout and draws everything else: head sizes and counts, shared
key heads, depths, feed-forward sizes, norm epsilon, rotary base, windows, which blocks of the tower see whole pictures, tied or not, picture
shapes, how many a sample, how samples are packed. Equal seeds draw equal configurations on every machine.

Bars: 1e-5 relative (DESIGN). Measured maxima over the sweep: logits 1.3e-6, loss 2.2e-7, gradients 2.5e-6, gradient norm 2.2e-7, SGD step 2.5e-6.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import logging as quiet

from eureka_megatron.demo.forms import FORMS, build_published
from eureka_megatron.types import Sample
from eureka_megatron.verify import Job, Layout, made_up_samples, measure, write_reference
from tests.helpers.ranks import run_ranks

SEED, CONFIGURATIONS = 2025, 64
CHUNKS = [("one rank", 1, range(24)), ("one rank", 1, range(24, 48)), ("TP 2", 2, range(48, CONFIGURATIONS))]


def draw(number: int, tensor: int) -> dict[str, Any]:
    """Configuration `number`: {"form" and "sizes" of build_published, "pictures" of the samples, fields of "job" and "layout"}."""
    random = np.random.default_rng((SEED, number))

    def one_of(*choices: Any) -> Any:
        return choices[random.integers(len(choices))]

    kv_heads = one_of(*(kv for kv in (1, 2, 3, 4) if kv % tensor == 0 or tensor % kv == 0))
    text_heads = kv_heads * one_of(*(n for n in (1, 2, 3, 5) if kv_heads * n % tensor == 0))
    vision_heads, vision_depth = one_of(1, 2, 3, 4), int(random.integers(1, 5))
    sizes = {
        "tied": one_of(True, False),
        "text_hidden": text_heads * (one_of(8, 16, 20, 32, 64) if text_heads <= 6 else 16),
        "text_layers": int(random.integers(1, 5)),
        "text_heads": text_heads,
        "kv_heads": kv_heads,
        "ffn": one_of(32, 90, 256, 514),
        "vision_hidden": vision_heads * one_of(8, 16, 20, 32, 80),
        "vision_depth": vision_depth,
        "vision_heads": vision_heads,
        "vision_ffn": one_of(33, 64, 171, 320),
        "window_size": one_of(56, 112),
        "full_attention_blocks": [block for block in range(vision_depth) if one_of(True, False)],
        "vocab_size": one_of(268, 300, 384, 1000),
        "initializer_range": one_of(0.02, 0.05),
        "rms_norm_eps": one_of(1e-6, 1e-5),
        "rope_theta": one_of(1e4, 1e6),
    }
    return {
        "sizes": sizes,
        "form": one_of(*FORMS),
        "pictures": [draw_pictures(random) for _ in range(random.integers(1, 5))],
        "job": {"max_tokens": one_of(0, 4096)},
        "layout": {"sequence_parallel": tensor > 1 and one_of(True, False)},
    }


def draw_pictures(random: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """(height, width) in merge units of 0 to 4 pictures, together at most 120 units."""
    edges = ((1, 1), (1, 2), (20, 3), (3, 20), (4, 4), (8, 4), (2, 2))
    drawn = [
        edges[random.integers(len(edges))] if random.integers(2) else tuple(random.integers(1, 10, 2).tolist())
        for _ in range(random.integers(0, 5))
    ]
    while sum(height * width for height, width in drawn) > 120:
        drawn.pop()
    return tuple(drawn)


def build(directory: Path, number: int, drawn: dict[str, Any]) -> None:
    build_published(directory, drawn["form"], seed=number, randomize_all=True, **drawn["sizes"])


def samples_of(number: int, tensor: int, directory: Path) -> list[Sample]:
    return made_up_samples(directory, seed=number, pictures=draw(number, tensor)["pictures"])


def sweep(rank: int, numbers: range, tensor: int, folder: str) -> list[dict[str, Any] | None]:
    """The ranks share out the references, then measure together."""
    quiet.disable_progress_bar()
    directories = {number: Path(folder) / str(number) for number in numbers}
    if rank == 0:  # transformers saves nothing on the others
        for number, directory in directories.items():
            build(directory, number, draw(number, tensor))
    torch.distributed.barrier()
    for number in numbers[rank::tensor]:
        directory = directories[number]
        write_reference(directory, directory / "reference", samples_of(number, tensor, directory), grads=True)
    torch.distributed.barrier()
    reports = []
    for number, directory in directories.items():
        samples, drawn = samples_of(number, tensor, directory), draw(number, tensor)
        options, layout = drawn["job"], drawn["layout"]
        options["max_tokens"] = max(options["max_tokens"], max(map(len, samples)) + 1)
        job = Job(
            str(directory), str(directory / "reference"), tuple(samples), Layout(tensor=tensor, **layout), **options
        )
        reports.append(measure(rank, job, "env://"))
    return reports


@pytest.mark.parametrize(("name", "tensor", "numbers"), CHUNKS, ids=lambda value: str(value).replace(" ", "-"))
def test_drawn_configurations_equal_transformers(name: str, tensor: int, numbers: range) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reports = run_ranks(sweep, tensor, numbers, tensor, folder, timeout_seconds=600)[0]
    for figure, bar in reports[0]["bars"].items():
        values = [report["figures"][figure] for report in reports]
        worst = int(np.argmax(values))
        print(f"{name}: {figure} {values[worst]:.1e} (bar {bar:.0e}) in {numbers[worst]}")
    failed = {number: report for number, report in zip(numbers, reports, strict=True) if not report["passed"]}
    assert not failed, "\n".join(
        f"{number}: {draw(number, tensor)}\n  {report['figures']} {report['worst']}"
        for number, report in failed.items()
    )


def test_the_sweep_covers_what_it_claims() -> None:
    drawn = [draw(number, tensor) for _, tensor, numbers in CHUNKS for number in numbers]
    sizes = [one["sizes"] for one in drawn]
    counts = {len(pictures) for one in drawn for pictures in one["pictures"]}
    shapes = {shape for one in drawn for pictures in one["pictures"] for shape in pictures}
    assert len(drawn) == CONFIGURATIONS >= 50
    assert counts == {0, 1, 2, 3, 4}
    assert {(1, 1), (20, 3), (3, 20)} <= shapes
    assert {len(one["full_attention_blocks"]) for one in sizes} >= {0, 1, 2, 3}
    assert {one["kv_heads"] for one in sizes} == {1, 2, 3, 4}
    assert {(one["tied"], one["window_size"]) for one in sizes} == {(True, 56), (True, 112), (False, 56), (False, 112)}
    assert any(not any(one["pictures"]) for one in drawn), "no configuration without any picture"
