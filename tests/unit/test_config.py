"""A configuration is refused before anything starts, with the key, what was found and what would be right."""

import ast
import inspect
from pathlib import Path

import pytest
from pydantic import BaseModel

from eureka_megatron import config as config_module
from eureka_megatron.config import SFT_DEFAULTS, ModelSection, RunConfig, load_config, make_config
from eureka_megatron.errors import ConfigError, nearest
from eureka_megatron.layout import ParallelSection
from eureka_megatron.run.checks import check_lengths

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"model": {"path": "model"}, "data": {"train": "train.jsonl"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: model}\ndata: {train: train.jsonl}\n")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, list(overrides))
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------------- accepted


def test_model_and_data_are_all_that_is_needed(path):
    config = load_config(path)
    assert config == make_config(MINIMAL)
    assert config.model.path == Path("model")


def test_defaults_are_the_published_7b_run():
    config = make_config(MINIMAL)
    assert (config.training.prompts_per_step, config.rollout.samples_per_prompt) == (128, 8)
    assert (config.training.responses_per_update, config.optimizer.lr) == (128, 1e-6)
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (3000, 4096)
    assert (config.data.min_pixels, config.data.max_pixels) == (4 * 28**2, 640 * 28**2)
    assert (config.algorithm.filter.lower, config.algorithm.filter.upper) == (0.1, 0.9)


def test_overrides_are_applied_in_order_and_typed(path):
    config = load_config(
        path,
        [
            "training.steps=3",
            "training.steps=7",
            "optimizer.lr=3e-4",
            "data.media=[a,b]",
            "run.name=a=b",
            "data.test=null",
        ],
    )
    assert (config.training.steps, config.optimizer.lr) == (7, 3e-4)
    assert config.data.media == (Path("a"), Path("b"))
    assert config.run.name == "a=b"
    assert config.data.test is None


def test_an_override_reaches_into_free_options(path):
    assert load_config(path, ["algorithm.loss_options.epsilon_high=0.28"]).algorithm.loss_options == {
        "epsilon_high": 0.28
    }


def test_keys_may_refer_to_each_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: blue, output: 'runs/${run.name}'}\nmodel: {path: m}\ndata: {train: t}\n")
    assert load_config(path, ["run.name=red"]).run.output == Path("runs/red")


def test_a_configuration_cannot_be_changed():
    config = make_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


def test_world_size_is_the_product_of_the_axes():
    parallel = {"tensor": 2, "pipeline": 3, "data": 4, "sequence_parallel": True}
    assert make_config(MINIMAL | {"parallel": parallel}).parallel.world_size == 24


# YAML 1.1 and 1.2 make something else of each of these.
NAMES = ["20251125", "1_2", "1e3", "no", "0x10", "2025-11-25", "12:30", "007", "1.0", "true", "1e-6", "=", "<<", ".5"]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_paths_stay_as_they_are_written(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: {name}, output: {name}}}\ntracking: {{project: {name}}}\nmodel: {{path: {name}, freeze: [{name}]}}\n"
        f"data: {{train: {name}, test: {name}, media: [{name}]}}\n"
    )
    config = load_config(path)
    texts = [config.run.name, config.tracking.project, config.data.train, *config.model.freeze]
    paths = [config.run.output, config.model.path, config.data.test, *config.data.media]
    assert {*texts, *map(str, paths)} == {name}
    path.write_text("model: {path: m}\ndata: {train: t}\n")
    keys = ("run.name", "run.output", "tracking.project", "model.path", "data.train", "data.test", "rewards.function")
    config = load_config(path, [f"{key}={name}" for key in keys] + [f"rewards.urls=[{name}]", f"run.name='{name}'"])
    texts = [config.run.name, config.tracking.project, config.data.train, config.rewards.function, *config.rewards.urls]
    assert {*texts, *map(str, (config.run.output, config.model.path, config.data.test))} == {name}


def test_an_override_of_text_is_all_that_follows_the_sign(path):
    for text in ("a: b #1", "- x", "[a", "{a}", "*a", "%a", "Straße 7/a, b", "a=b", " a"):
        assert load_config(path, [f"run.name={text}"]).run.name == text
    assert load_config(path, ["run.name='null'"]).run.name == "null"
    for text in ("null", "", "~"):
        assert "run.name: needs a value" in message(path, f"run.name={text}")
        assert load_config(path, ["data.test=a", f"data.test={text}"]).data.test is None
    assert 'quote it if that is meant: "null"' in message(path, "run.name=null")
    assert "algorithm.compat: Input should be 'mm_eureka', found 'no'" in message(path, "algorithm.compat=no")


def test_numbers_are_those_of_yaml_1_2(path):
    config = load_config(
        path, ["optimizer.lr=1e-6", "training.steps=1_000", "run.seed=010", "rewards.format_weight=.5"]
    )
    assert (config.optimizer.lr, config.training.steps, config.run.seed, config.rewards.format_weight) == (
        1e-6,
        1000,
        10,
        0.5,
    )
    assert load_config(path, ["training.steps=1e3"]).training.steps == 1000
    assert "training.steps: Input should be a valid integer" in message(path, "training.steps=12:30")
    options = load_config(path, ["algorithm.loss_options={a: 1e-2, b: yes, c: x, d: null}"]).algorithm.loss_options
    assert options == {"a": 0.01, "b": True, "c": "x", "d": None}
    path.write_text("run:\nmodel: {path: m}\ndata: &d {train: t}\noptimizer: {lr: 1e-6}\ntraining: {steps: 1_000}\n")
    config = load_config(path)
    assert (config.optimizer.lr, config.training.steps, config.run.name) == (1e-6, 1000, "eureka")


def test_keys_may_refer_to_those_that_have_their_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {output: 'runs/${run.name}/${tracking.project}-${training.steps}'}\nmodel: {path: '${run.output}/m'}\n"
        "data: {train: t, media: ['${model.path}', '${run.name}']}\nsft: {steps: '${training.steps}'}\n"
    )
    config = load_config(path)
    assert config.run.output == Path("runs/eureka/eureka_megatron-1000")
    assert config.data.media == (Path("runs/eureka/eureka_megatron-1000/m"), Path("eureka"))
    assert config.sft.steps == 1000
    config = load_config(
        path, ["run.name=${optimizer.lr}", "data.test=${data.media[1]}", "rewards.urls=${model.freeze}"]
    )
    assert config.run.output == Path("runs/1e-06/eureka_megatron-1000")
    assert (config.run.name, config.data.test, config.rewards.urls) == ("1e-06", Path("1e-06"), ())
    assert load_config(path, ["run.name=007", "run.output=${run.name}"]).run.output == Path("007")


def test_a_command_may_have_defaults_of_its_own(path):
    assert load_config(path, defaults=SFT_DEFAULTS).optimizer.lr == 1e-5
    assert load_config(path, ["optimizer.lr=1e-6"], defaults=SFT_DEFAULTS).optimizer.lr == 1e-6
    path.write_text("model: {path: m}\ndata: {train: t}\noptimizer: {lr: 2e-3}\n")
    assert load_config(path, defaults=SFT_DEFAULTS).optimizer.lr == 2e-3


def test_a_tilde_is_the_home_folder_in_every_path(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/müller x")
    keys = ("run.output", "model.path", "data.test", "algorithm.reference", "rewards.function")
    path.write_text("model: {path: '~/m'}\ndata: {train: '~/a.jsonl:0.7, ~/b.jsonl:0.3', media: [~/a, b~, '~']}\n")
    config = load_config(path, [f"{key}=~/x:y" for key in keys])
    found = [
        config.run.output,
        config.model.path,
        config.data.test,
        config.algorithm.reference,
        config.rewards.function,
    ]
    assert {*map(str, found)} == {"/home/müller x/x:y"}
    assert config.data.train == "/home/müller x/a.jsonl:0.7,/home/müller x/b.jsonl:0.3"
    assert config.data.media == (Path("/home/müller x/a"), Path("b~"), Path("/home/müller x"))
    assert load_config(path, ["run.name=~/x"]).run.name == "~/x"


def test_a_home_that_does_not_exist_and_a_variable_left_over_are_refused(path, monkeypatch):
    assert "run.output: '~nobody-here/x': there is no such home folder" in message(path, "run.output=~nobody-here/x")
    assert "model.path: '$HOME/m' holds a variable that no shell" in message(path, "model.path=$HOME/m")
    assert "data.train: 'a,x/$DATA' holds a variable" in message(path, "data.train=a,x/$DATA").replace("'x/", "'a,x/")
    assert "environment variables are not read" in message(path, "data.test=${HOME}/m")
    monkeypatch.setenv("HOME", "")
    assert "there is no such home folder" in message(path, "run.output=~/x")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("algorithm.filter.lowr=0.2", "unknown key 'algorithm.filter.lowr'; did you mean 'lower'?"),
        ("zzz=1", "unknown key 'zzz'; valid: algorithm, checkpoint, data, model"),
        ("training.steps=1.5", "training.steps: Input should be a valid integer"),
        ("training.steps=abc", "found 'abc'"),
        ("training.steps=", "training.steps: Input should be a valid integer, found None"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1, found 0"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, found -1"),
        ("optimizer.lr=nan", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr.x=1", "optimizer.lr: Input should be a valid number"),
        ("model=3", "model: Input should be a valid dictionary"),
        ("model.backend=tee", "model.backend: Input should be 'local' or 'te', found 'tee'"),
        ("model.freeze=[vision,[a]]", "model.freeze.1: Input should be a valid string, found ['a']"),
        ("parallel.virtual_pipeline=2", "parallel: virtual_pipeline needs pipeline > 1"),
        ("tracking.tensorboard=maybe", "tracking.tensorboard: Input should be a valid boolean"),
        ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt: Input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_key_or_value_is_named(path, override, expected):
    assert expected in message(path, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.sequence_parallel=true"], "sequence_parallel needs tensor > 1"),
        (["algorithm.filter.lower=0.95"], "need 0 <= lower <= upper <= 1, got lower=0.95, upper=0.9"),
        (["algorithm.filter.lower=nan"], "algorithm.filter.lower: Input should be a finite number"),
        (["run.seed=-1"], "run.seed: Input should be greater than or equal to 0"),
        (["optimizer.betas=[0.9,1.5]"], "betas must lie in [0, 1), got [0.9, 1.5]"),
        (["training.steps=true"], "steps: needs a number, found true"),
        (["run.name=${oc.env:HOME}"], "resolvers such as ${oc.env:…} are not allowed"),
        (["data.media=['${now:%Y}']"], "resolvers such as ${oc.env:…} are not allowed"),
        (["run.name=${run.nam}"], "run.name: Interpolation key 'run.nam' not found"),
        (["run.name=${run.output}", "run.output=${run.name}"], "run.name: Recursive interpolation detected"),
        (["run.name=${"], "override 'run.name=${'"),
        (["optimizer.lr=["], "override 'optimizer.lr=['"),
        (
            ["training.responses_per_update=100"],
            "must divide training.prompts_per_step × rollout.samples_per_prompt = 1024",
        ),
        (["rollout.max_model_tokens=100"], "= 7096 exceeds rollout.max_model_tokens=100"),
        (["data.min_pixels=999999"], "data.min_pixels=999999 exceeds data.max_pixels=501760"),
    ],
)
def test_a_combination_that_cannot_work_is_named(path, overrides, expected):
    assert expected in message(path, *overrides)


def test_rollouts_that_no_micro_batch_takes_are_refused_before_anything_starts(path):
    for fits in ("training.max_tokens_per_micro_batch=7096", "parallel.context=4"):
        check_lengths(load_config(path, [fits]))
    limit = ["training.max_tokens_per_micro_batch=7097"]
    check_lengths(load_config(path, limit))
    with pytest.raises(
        ConfigError, match=r"data\.max_prompt_tokens \+ rollout\.max_response_tokens = 7096 exceeds training.*=7095"
    ):
        check_lengths(load_config(path, ["training.max_tokens_per_micro_batch=7095"]))
    with pytest.raises(ConfigError, match=r"=7097 \(7092, filled up for parallel\.context\)"):
        check_lengths(load_config(path, [*limit, "parallel.context=6"]))


@pytest.mark.parametrize("override", ["training.steps", "=3", "training.steps:3"])
def test_an_override_of_another_form_is_named(path, override):
    assert message(path, override) == f"override {override!r} is not of the form section.key=value"


def test_several_problems_are_told_together(path):
    lines = message(path, "optimizer.lrr=1", "trainin.steps=1").splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: m\ndata: [", "is not valid YAML: "),
        ("model: {path: m}\nmodel: {path: n}\ndata: {train: t}\n", "found duplicate key model"),
        ("- a\n- b\n", "must be a mapping of sections, found list"),
        ("", "key 'model.path' is required"),
        ("model: {path: m}\n", "key 'data.train' is required"),
        ("model:\n  path: m\n  path: n\ndata: {train: t}\n", "found duplicate key model.path"),
        ("run: {output: runs/${run.name}}\nmodel: {path: m}\ndata: {train: t}\n", "a value with ${…} is quoted"),
        ("model: &m {path: m, again: *m}\ndata: {train: t}\n", "an alias refers to itself"),
        ("model: {path: !!python/name:os.system }\n", "model.path: the tag 'python/name:os.system' is not understood"),
        ("run:\n  name:\nmodel: {path: m}\ndata: {train: t}\n", "run.name: needs a value, found nothing"),
        ("model: {}\ndata: {train: t}\n", "key 'model.path' is required"),
        ("model: null\ndata: {train: t}\n", "model: Input should be a valid dictionary"),
        ("model: {path: '${model.pth}'}\ndata: {train: t}\n", "Interpolation key 'model.pth' not found"),
    ],
)
def test_a_broken_file_is_told_in_one_line_a_problem_with_its_name(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    told = message(path)
    assert expected in told
    assert all(line.startswith(str(path)) for line in told.splitlines())


def test_a_missing_file_is_named(tmp_path):
    assert message(tmp_path / "none.yaml") == f"configuration file {tmp_path / 'none.yaml'} does not exist"
    assert "does not exist" in message(tmp_path)  # a folder


def test_config_errors_end_with_2():
    assert ConfigError.exit_code == 2


def test_nearest_names_one_or_lists_all():
    assert nearest("lrr", ["lr", "betas"]) == "; did you mean 'lr'?"
    assert nearest("zzz", ["lr", "betas"]) == "; valid: betas, lr"


# ------------------------------------------------------------------------------------------------ declared, hence read


# Under which names what `RunConfig.layout` makes, and what a section inherits, is passed on.
LAYOUT = ("layout", "Layout")
PASSED_ON = {ModelSection: (LAYOUT, ("execution", "Execution")), ParallelSection: (LAYOUT,)}


def sections() -> dict[type[BaseModel], str]:
    """Every section class and the attribute under which its parent holds it."""
    found: dict[type[BaseModel], str] = {}

    def visit(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found[field.annotation] = name
                visit(field.annotation)

    visit(RunConfig)
    return found


def reads(tree: ast.AST, held_as: str, class_name: str) -> set[str]:
    """Attributes read from a section in a file: `….held_as.x`, or `name.x` where name was assigned or annotated so."""
    aliases = {held_as}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = []
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs.append((target, node.value))
            aliases |= {
                _last(name) for name, value in pairs if isinstance(value, ast.Attribute) and value.attr == held_as
            }
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            annotated = class_name in ast.unparse(node.annotation)
            if annotated:
                aliases.add(node.arg if isinstance(node, ast.arg) else _last(node.target))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if _last(node.value) in aliases}


def _last(node: ast.AST) -> str:
    """`config.rollout` and `rollout` both end in rollout."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def own_reads(section: type[BaseModel]) -> set[str]:
    """Fields that a section's properties read, when the property itself is read elsewhere (`parallel.world_size`)."""
    tree = ast.parse(inspect.getsource(section))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == section.__name__:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and any(_last(d) == "property" for d in item.decorator_list):
                    found |= {
                        n.attr for n in ast.walk(item) if isinstance(n, ast.Attribute) and _last(n.value) == "self"
                    }
    return found


def test_every_declared_key_is_read_somewhere():
    """A key that nobody reads is a promise nobody keeps."""
    files = [path for path in (ROOT / "eureka_megatron").rglob("*.py") if path != Path(config_module.__file__)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    unread = []
    for section, held_as in sections().items():
        names = [(held_as, section.__name__), *PASSED_ON.get(section, ())]
        read = set().union(*(reads(tree, *held) for tree in trees for held in names)) | own_reads(section)
        unread += [f"{held_as}.{name}" for name in section.model_fields if name not in read]
    read = set().union(*({n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} for tree in trees))
    unread += [name for name in RunConfig.model_fields if name not in read]
    assert not unread, "declared in config.py, read nowhere: " + ", ".join(sorted(unread))


def test_the_search_for_reads_sees_chains_aliases_and_annotations():
    class_name = "OptimizerSection"
    for text in (
        "f(config.optimizer.lr)",
        "o = self.config.optimizer\nf(o.lr)",
        "def f(o: OptimizerSection): return o.lr",
    ):
        assert reads(ast.parse(text), "optimizer", class_name) >= {"lr"}
    assert "lr" not in reads(ast.parse("f(other.lr, config.sft.lr)"), "optimizer", class_name)


@pytest.mark.parametrize(
    "override", ["top_p=0.9", "top_k=50", "min_p=0.05", "repetition_penalty=1.05", "presence_penalty=0.5"]
)
def test_sampling_from_another_policy_than_is_trained_is_refused(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout: {override}: rollouts come from the whole policy.*evaluate_top_p"):
        load_config(path, [f"rollout.{override}"])


def test_sampling_settings_that_change_nothing_are_passed_over(path: Path) -> None:
    neutral = ["rollout.top_p=1.0", "rollout.top_k=-1", "rollout.repetition_penalty=1.0", "rollout.min_p=0"]
    assert load_config(path, neutral) == load_config(path)
