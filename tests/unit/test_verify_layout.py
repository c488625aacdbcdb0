"""The command line of `eureka verify` has every field of the layout, under the same name and default."""

import pytest

from eureka_megatron.cli.arguments import parse
from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Execution, Layout, from_options

EVERYTHING = Layout(
    tensor=2,
    pipeline=2,
    virtual_pipeline=2,
    context=2,
    data=2,
    sequence_parallel=True,
    layers_first_stage=3,
    layers_last_stage=1,
    vision_parallel="data",
)
WORDS = (
    "--tp 2 --pp 2 --vpp 2 --cp 2 --dp 2 --sequence-parallel --layers-first-stage 3 --layers-last-stage 1 "
    "--vision-parallel data --recompute full --backend te --dtype bfloat16"
)


def test_every_axis_can_be_given_on_the_command_line() -> None:
    plain, full = (parse(["verify", "--hf", "x", *words.split()]) for words in ("", WORDS))
    assert from_options(Layout, plain) == Layout()
    assert from_options(Layout, full) == EVERYTHING
    assert EVERYTHING.model_fields_set == set(Layout.model_fields)
    assert EVERYTHING.world_size == 16
    assert from_options(Execution, plain) == Execution()
    assert from_options(Execution, full) == Execution(dtype="bfloat16", backend="te", recompute="full")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sequence-parallel", r"sequence_parallel needs tensor > 1"),
        ("--vpp 2", r"virtual_pipeline needs pipeline > 1"),
        ("--backend te", r"backend 'te' computes in bfloat16"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(words: str, message: str) -> None:
    options = parse(["verify", "--hf", "x", *words.split()])
    with pytest.raises(ConfigError, match=message) as caught:
        from_options(Layout, options), from_options(Execution, options)
    assert "\n" not in str(caught.value)


def test_a_layout_is_told_by_what_differs_from_one_rank() -> None:
    assert str(Layout()) == "one rank"
    assert str(Layout(tensor=2, vision_parallel="data")) == "tensor 2, vision_parallel data"
