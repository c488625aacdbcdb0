"""The benchmarks' scripts start, and what they compute from times is right. Their figures come from an idle machine only."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "benchmark"
SCRIPTS = ("all", "data", "memory", "scaling", "step", "sync", "train")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


common = load("common")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_what_it_does(name: str) -> None:
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
    assert f"tools/benchmark/{name}.py" in done.stdout


def test_ratio_is_that_of_neighbours_in_time() -> None:
    # The third pair ran on a busy machine: a ratio of medians would be 4 / 3.
    assert common.median_ratio([2.0, 4.0, 40.0], [1.0, 3.0, 20.0]) == 2.0
    with pytest.raises(ValueError):
        common.median_ratio([1.0], [1.0, 2.0])


def test_slope_of_a_line_and_of_noise_around_it() -> None:
    assert common.slope([5.0, 7.0, 9.0]) == pytest.approx(2.0)
    assert common.slope([1.0, -1.0, -1.0, 1.0]) == pytest.approx(0.0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_is_that_of_the_law(power: float) -> None:
    sizes = [1.0, 2.0, 8.0]
    assert common.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_turns_count_after_the_warmup_and_change_who_begins() -> None:
    calls: list[str] = []
    found = common.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}


def test_goal_is_met_from_its_own_side() -> None:
    assert common.Result("rate", 2.0, goal=2.0).met is True
    assert common.Result("rate", 1.9, goal=2.0).met is False
    assert common.Result("growth", 0.2, goal=0.1, at_least=False).met is False
    assert common.Result("figure", 1.0).met is None


def test_report_is_a_table_and_lines_that_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        common.Result("step, tiny", 0.65, "×", goal=1.5, peer="TRL 0.57 s", details={"rounds": [1.0, 2.0]}),
        common.Result("growth", 0.05, "MB a step", goal=0.1, at_least=False),
        common.Result("pictures", 3.0),
    ]
    common.report(results, tmp_path / "lines.json")
    lines = (tmp_path / "lines.json").read_text().splitlines()
    assert [json.loads(line)["met"] for line in lines] == [False, True, None]
    assert [common.Result.read(line) for line in lines] == results
    told = capsys.readouterr().out
    assert "step, tiny  0.65 ×          ≥ 1.5  missed  TRL 0.57 s" in told
    assert "growth      0.05 MB a step  ≤ 0.1  met" in told


def test_model_sizes_are_what_is_said_of_them(tmp_path: Path) -> None:
    from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
    from eureka_megatron.models.qwen2_5_vl.operations import text_parameters, tower_parameters

    for size, millions in (("tiny", 1.8), ("medium", 39), ("large", 400)):
        config = read_hf_config(common.build_model(tmp_path / size, size, weights=False))
        parameters = text_parameters(config) + tower_parameters(config)
        assert parameters == pytest.approx(millions * 1e6, rel=0.05), (size, parameters)
