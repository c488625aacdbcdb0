"""The planner by arithmetic: sizes of the published models, what is searched and refused, and the recipes' layouts."""

from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from eureka_megatron.config import load_config
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.gpus import GPUS, peak_of
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.operations import text_parameters, tower_parameters
from eureka_megatron.planning import dry_run as module
from eureka_megatron.planning import report
from eureka_megatron.planning.command import Options, asked
from eureka_megatron.planning.dry_run import DryRun, Machine, dry_run
from eureka_megatron.planning.load import estimate, in_flight, layers_of, stages_of_interest
from eureka_megatron.planning.published import CONFIGS, SIZES, configuration, sizes_of
from eureka_megatron.planning.search import search
from eureka_megatron.weights.table import expand, rows

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "mmk12").glob("*.yaml"))
PARAMETERS = {
    "3b": 3_754_622_976,
    "7b": 8_292_166_656,
    "32b": 33_452_718_336,
    "72b": 73_410_777_344,
}  # of the released weights


@pytest.mark.parametrize("size", SIZES)
def test_the_arithmetic_has_every_parameter_of_the_published_models(size: str) -> None:
    config = read_hf_config(CONFIGS / size)
    assert sizes_of(CONFIGS / size) == config
    in_table = sum(prod(shape) for row in expand(rows(config)) if not row.copy for shape in row.hf.values())
    assert text_parameters(config) + tower_parameters(config) == in_table == PARAMETERS[size]


def test_models_by_name(tmp_path: Path) -> None:
    assert configuration("7B") == configuration("Qwen/Qwen2.5-VL-7B-Instruct@main") == CONFIGS / "7b"
    assert configuration(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="8b: neither a directory nor one of 3b, 7b, 32b, 72b"):
        configuration("8b")


def test_peaks_are_of_boards_that_are_known() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == GPUS["h100"].matrix
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312
    assert peak_of("NVIDIA H20") == 148
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "CPU", "NVIDIA GeForce RTX 4090"):
        assert peak_of(other) is None


def test_layers_and_micro_batches_of_stages() -> None:
    config = read_hf_config(CONFIGS / "32b")
    assert [layers_of(config, Layout(pipeline=4), stage) for stage in range(4)] == [16] * 4
    uneven = Layout(pipeline=4, layers_first_stage=14, layers_last_stage=10)
    assert [layers_of(config, uneven, stage) for stage in range(4)] == [14, 20, 20, 10]
    assert [in_flight(Layout(pipeline=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(pipeline=2, virtual_pipeline=2), 0) == 2.5  # five chunks of two a stage
    assert stages_of_interest(Layout(pipeline=8)) == [0, 1, 7]
    assert stages_of_interest(Layout()) == [0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_the_layout_that_is_ranked_first(recipe: Path) -> None:
    run = load_config(recipe)
    size = run.model.path.name.split("-")[2].lower()
    gpus = {"3b_1gpu": 1, "3b_8gpus": 8, "7b_single_node": 8, "7b_multi_node": 24, "7b_cpgd": 8, "72b": 128}
    count = gpus.get(recipe.stem.removeprefix("qwen2_5_vl_"), 48)
    found = search(asked(Options(gpus=count, model=size, recipe=recipe, gpu_memory=80), [])).fitting
    first = next(outcome for outcome in found if outcome.candidate.engines.colocated == (run.placement == "colocated"))
    wanted = report.keys(first)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for section, given in wanted.items():
        own = values.get(section, {})
        assert own == given if not isinstance(given, dict) else {key: own.get(key) for key in given} == given, section
    assert "Not yet run on hardware" in recipe.read_text(encoding="utf-8")


def test_what_cannot_fit_says_how_many_gpus_would_do() -> None:
    from eureka_megatron.planning.command import _too_few

    ask = asked(Options(gpus=1, model="7b", gpu_memory=80), [])
    assert not search(ask).fitting
    assert "1 × 80 GiB are too few for this model: it needs at least 4 GPUs of this size" in _too_few(ask)
    with pytest.raises(ConfigError, match="--gpu h10: unknown"):
        asked(Options(gpus=1, model="7b", gpu="h10"), [])
    with pytest.raises(ConfigError, match="--model or --recipe"):
        asked(Options(gpus=1), [])


def test_the_best_of_what_does_not_fit_has_a_remedy() -> None:
    found = search(asked(Options(gpus=8, model="7b", gpu_memory=80), []))
    said = report.refused(found.too_large, found.fitting[0])
    assert "DP 8, colocated, would take" in said[0]
    assert "model.recompute=full would fit" in said[0]
    assert all(outcome.fits() for outcome in found.fitting)
    assert not any(outcome.fits() for outcome in found.too_large)


def by_arithmetic(run: DryRun) -> list[Any]:
    """In place of rehearsals, which tests/dist/test_planning.py has."""
    assert run.config_dir is not None
    config = read_hf_config(run.config_dir)
    shape = module.Shape(
        run.config.layout,
        run.config.model.recompute,
        run.config.training.max_tokens_per_micro_batch,
        7096,
        501760,
        True,
    )
    return [estimate(config, shape, stage) for stage in stages_of_interest(run.config.layout)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run_where_its_model_is_not(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DryRun, "rehearsed", by_arithmetic)
    dry_run(load_config(recipe), Machine.named("h100", None, None, 8))
    assert "nothing wrong was found; not on this machine, so not checked: Qwen/Qwen2.5-VL-" in capsys.readouterr().out


def test_planning_fetches_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_dir: Path) -> None:
    """With a network and an empty cache: config.json of somebody's model alone."""
    asked_for: list[tuple[str, str, str | None]] = []

    def one_file(repository: str, name: str, revision: str | None = None) -> str:
        asked_for.append((repository, name, revision))
        return str(tiny_dir / name)

    def whole(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        assert local_files_only, "weights would be downloaded"
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    monkeypatch.setattr(DryRun, "rehearsed", by_arithmetic)
    assert configuration("somebody/Fine-Tune@v2") == tiny_dir
    run = DryRun(
        load_config(RECIPES[0], ["model.path=somebody/Fine-Tune"]), Machine.named("h100", None, None, 8), False
    )
    assert run.check("model", run.model)
    assert run.elsewhere
    assert asked_for == [("somebody/Fine-Tune", "config.json", "v2"), ("somebody/Fine-Tune", "config.json", None)]


def test_a_model_that_is_nowhere_may_be_a_folder_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unknown)
    with pytest.raises(UserError, match="runs/model: no directory, and its config"):
        configuration("runs/model")


def test_a_dry_run_tells_everything_that_is_wrong_at_once(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DryRun, "rehearsed", by_arithmetic)
    recipe = ROOT / "examples" / "mmk12" / "qwen2_5_vl_7b_single_node.yaml"
    wrong = [
        f"model.path={tiny_dir}",
        f"data.train={tmp_path / 'none.jsonl'}",
        f"data.test={tmp_path / 'neither.jsonl'}",
        f"run.output={tmp_path / 'run'}",
        "parallel.tensor=16",
        "algorithm.loss=ppo",
        "rollout.tensor=1",
        "rollout.engines=64",
        "rewards.function=nowhere:judge",
        "training.max_tokens_per_micro_batch=7000",
    ]
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "model.safetensors").touch()
    with pytest.raises(ConfigError) as error:
        dry_run(load_config(recipe, wrong), Machine.named("h100", None, 1, 8))
    said = str(error.value)
    for part in (
        "parallel.tensor=16 does not divide",
        "exceeds training.max_tokens_per_micro_batch=7000",
        "parallel.tensor=16 needs so many GPUs on one node",
        "algorithm: ",
        "there is no package 'nowhere'",
        "none.jsonl: no such data file",
        "neither.jsonl: no such data file",
        "holds the weights of an earlier run",
    ):
        assert part in said, f"{part!r} is not told:\n{said}"


def test_a_loss_that_nobody_knows_is_told_and_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DryRun, "rehearsed", lambda run: pytest.fail("rehearsed"))
    recipe = ROOT / "examples" / "mmk12" / "qwen2_5_vl_7b_single_node.yaml"
    with pytest.raises(ConfigError, match="unknown loss option 'nonsense'"):
        dry_run(load_config(recipe, ["algorithm.loss_options.nonsense=1"]), Machine.named("h100", None, None, 8))


def test_a_rank_and_an_engine_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DryRun, "rehearsed", by_arithmetic)
    recipe = ROOT / "examples" / "mmk12" / "qwen2_5_vl_7b_single_node.yaml"
    with pytest.raises(ConfigError) as error:
        dry_run(load_config(recipe, ["rollout.tensor=1", "rollout.engines=8"]), Machine.named("h100", 20, None, 8))
    said = str(error.value)
    assert "memory of a rank: 52." in said
    assert "model.recompute=full" in said
    assert "memory of an engine: 84% of 20 GiB hold 15.4 GiB of weights" in said
