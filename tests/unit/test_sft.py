"""How long `eureka sft` goes on, and what it says about that."""

from types import SimpleNamespace
from typing import Any

import pytest

from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import ConfigError
from eureka_megatron.run.sft import in_steps, supervise


def config(**sft: Any) -> RunConfig:
    return make_config({"model": {"path": "m"}, "data": {"train": "t", "workers": 0}, "sft": sft})


@pytest.mark.parametrize(
    ("sft", "steps"),
    [
        ({}, 2),  # three epochs of sixteen rows
        ({"samples_per_step": 4}, 12),
        ({"epochs": 0.5, "samples_per_step": 4}, 2),
        ({"epochs": 1, "samples_per_step": 5}, 4),  # the last row counts
        ({"epochs": 1e-9}, 1),
        ({"steps": 600}, 600),
    ],
)
def test_epochs_become_steps(sft: dict[str, Any], steps: int) -> None:
    found = in_steps(config(**sft), 16).sft
    assert (found.steps, found.epochs) == (steps, None)
    assert make_config(config(**found.model_dump()).model_dump(mode="json")).sft == found  # as it is recorded


def test_two_measures_of_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="sft: steps=3 and epochs=2 both say how long"):
        config(steps=3, epochs=2)


def test_epochs_are_told_at_the_start_and_with_every_step(tmp_path) -> None:
    model = build_published(tmp_path / "m", weights=False)
    paths = write_counting(tmp_path, train=6, test=1)
    dataset = load_dataset(paths.train, Processor(model, min_pixels=784), response_key="response")
    said, logged, sizes = [], [], []
    trainer = SimpleNamespace(
        start_phase=lambda optimizer, steps: None,
        sft=lambda samples: sizes.append(len(samples)) or {"loss": 1.0},
        save_ended=lambda: False,
        wait_for_save=lambda: None,
    )
    tracker = SimpleNamespace(say=said.append, log=lambda step, metrics: logged.append(metrics))
    supervise(trainer, dataset, in_steps(config(epochs=2, samples_per_step=4), 6), tracker)
    assert said == ["3 steps of 4 rows: 2 epochs of 6 rows, largest learning rate 1e-06"]
    assert [metrics["sft/epoch"] for metrics in logged] == pytest.approx([4 / 6, 8 / 6, 2])
    assert sizes == [4, 4, 4]
