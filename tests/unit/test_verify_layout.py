"""The layout of `eureka verify` has every axis that the model has, under the same name and default."""

import inspect

from eureka_megatron.cli.arguments import parse
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.verify import Layout
from eureka_megatron.verify.layout import OF_THE_MODEL

OTHER = {  # arguments that say nothing about the layout
    "rank", "world_size", "init_method", "timeout_seconds",
    "self", "model_path", "parallel", "dtype", "freeze", "max_tokens_per_micro_batch", "optimizer",
    "reference", "fp8", "fp8_recipe",
}  # fmt: skip
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
    recompute="full",
    backend="te",
)
WORDS = (
    "--tp 2 --pp 2 --vpp 2 --cp 2 --dp 2 --sequence-parallel --layers-first-stage 3 --layers-last-stage 1 "
    "--vision-parallel data --recompute full --backend te"
)


def arguments(function: object) -> dict[str, object]:
    found = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in found.items() if name not in OTHER}


def test_fields_are_the_arguments_of_the_groups_and_of_the_model() -> None:
    defaults = vars(Layout())
    assert arguments(init_parallel) | {"data": 1} == {n: v for n, v in defaults.items() if n not in OF_THE_MODEL}
    assert arguments(PolicyTrainer.__init__) == {name: defaults[name] for name in OF_THE_MODEL}


def test_options_hold_what_was_chosen_and_nothing_else() -> None:
    assert Layout().parallel_options == Layout().model_options == {}
    assert EVERYTHING.parallel_options | EVERYTHING.model_options | {"data": 2} == vars(EVERYTHING)
    assert EVERYTHING.world_size == 16


def test_every_axis_can_be_given_on_the_command_line() -> None:
    plain, full = (parse(["verify", "--hf", "x", *words.split()]) for words in ("", WORDS))
    assert {name: getattr(plain, name) for name in vars(Layout())} == vars(Layout())
    assert {name: getattr(full, name) for name in vars(Layout())} == vars(EVERYTHING)
