"""The import rules of the design, read from the syntax trees: nothing is imported here except in the last two tests.

An import counts wherever it stands, also inside a function or under `if TYPE_CHECKING:`. Each failure names file and line.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "eureka_megatron"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 80, 7

# Arrows point down; within a layer they may go sideways, but never in a circle.
LAYERS = (
    ("cli", "__main__"),
    ("demo", "verify", "doctor", "planning", "report"),
    ("loop",),
    ("run",),
    ("train", "rollout", "data", "rl", "tracking", "release", "evaluation"),
    ("weights", "checkpoint", "sync", "rewards"),
    ("models",),
    ("parallel",),
    ("types", "config", "layout", "gpus", "errors", "places", "session", "yaml_values"),
)
# Earlier places of what has moved up, kept for scripts outside this repository; nothing here imports them.
EARLIER = ("eureka_megatron.models.qwen2_5_vl.tiny",)
NEVER = (("train", "rollout"), ("rollout", "train"))
# Who may import what is heavy, as path prefixes below the package.
ALLOWED = {
    "vllm": ("rollout/engine.py", "rollout/weights.py", "rollout/worker.py", "sync/"),
    "ray": (
        "run/cluster.py",
        "run/placement.py",
        "rollout/pool.py",
        "train/actor.py",
        "train/pulse.py",
        "sync/ray_transfer.py",
    ),
    "megatron": ("models/", "parallel/", "train/", "planning/", "weights/online.py", "checkpoint/store.py"),
}
# Tested on bare torch, so they may not reach the trainer's or the engine's libraries by any path.
BARE = ("data", "rewards", "rl", "evaluation", "weights/splits.py", "weights/table.py")


@dataclass(frozen=True)
class Import:
    """`source` (a module of the package) imports `target` (any module) at `line`; `inside` a function or not."""

    source: str
    target: str
    line: int
    inside: bool

    def __str__(self) -> str:
        return f"{path_of(self.source).relative_to(ROOT)}:{self.line} imports {self.target}"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sources(PACKAGE)}


def path_of(module: str) -> Path:
    return modules()[module]


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name in modules() for found in imports_of(name))


def imports_of(module: str) -> list[Import]:
    path = path_of(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:  # `from package import module` means the module
                whole = f"{base}.{alias.name}"
                found.append(Import(module, whole if whole in modules() else base, node.lineno, inside))
        deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, deeper)

    visit(ast.parse(path.read_text(encoding="utf-8")), inside=False)
    return found


def own(found: Import) -> bool:
    return found.target == PACKAGE or found.target.startswith(PACKAGE + ".")


def part(module: str) -> str:
    """`eureka_megatron.rl.losses` belongs to part `rl`; the package itself to `""`."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def layer(module: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part(module) in parts)


def complain(problems: list[str], rule: str) -> None:
    assert not problems, rule + "\n  " + "\n  ".join(problems)


def test_every_part_has_a_layer():
    known = {name for parts in LAYERS for name in parts}
    unknown = sorted({part(module) for module in modules()} - known - {""})
    complain(unknown, "new parts of the package need a place in LAYERS (and in the design):")


def test_arrows_point_down():
    problems = [
        f"{found}: {part(found.source)} lies below {part(found.target)}"
        for found in imports()
        if own(found)
        and found.source not in EARLIER
        and part(found.source)
        and part(found.target)
        and layer(found.target) < layer(found.source)
    ]
    complain(problems, "imports go from " + " → ".join("{" + ", ".join(parts) + "}" for parts in LAYERS) + ":")


def test_train_and_rollout_never_meet():
    problems = [str(found) for found in imports() if (part(found.source), part(found.target)) in NEVER and own(found)]
    complain(problems, "train and rollout meet only in loop.py and through sync:")


def test_the_package_itself_imports_nothing():
    problems = [str(found) for found in imports() if found.source == PACKAGE]
    complain(problems, "eureka_megatron/__init__.py is imported by `eureka --help` and stays empty:")


def test_no_import_cycles():
    graph = {name: {found.target for found in imports_of(name) if found.target in modules()} for name in modules()}
    # A package importing its own modules is how packages are made; its modules importing it back is a cycle.
    for cycle in cycles(graph):
        pytest.fail("import cycle: " + " → ".join([*cycle, cycle[0]]))


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Cycles met by a depth-first walk; empty exactly when there are none."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> None:
        if node in way:
            found.append(way[way.index(node) :])
            return
        if node in done:
            return
        for target in sorted(graph[node]):
            walk(target, [*way, node])
        done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def test_the_cycle_search_finds_cycles():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


@pytest.mark.parametrize("library", ALLOWED)
def test_heavy_libraries_are_imported_only_where_they_belong(library):
    problems = [
        str(found)
        for found in imports()
        if found.target.partition(".")[0] == library
        and not str(path_of(found.source).relative_to(ROOT / PACKAGE)).startswith(ALLOWED[library])
    ]
    complain(problems, f"{library} may be imported only in {', '.join(ALLOWED[library])}:")


def test_layouts_table_and_rl_know_no_configuration_and_start_no_groups():
    """Pure functions of tensors: process groups arrive as arguments, options as keywords."""
    problems = []
    for found in imports():
        place = str(path_of(found.source).relative_to(ROOT / PACKAGE))
        if place.startswith("rl/") and own(found) and part(found.target) in ("config", "parallel", "models", "train"):
            problems.append(str(found))
        if place in BARE[3:] and found.target.startswith("torch.distributed"):
            problems.append(str(found))
    complain(problems, "rl/ and the layouts are pure:")


def test_published_configurations_are_read_in_one_place():
    """What transformers and vLLM make of a config.json depends on its form: nobody else asks their objects."""
    problems = []
    for path in modules().values():
        if path.relative_to(ROOT / PACKAGE).parts[0] in (
            "models",
            "demo",
        ):  # the demo writes checkpoints of every published form
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
            wrong = [alias.name for alias in node.names if alias.name.endswith("Config")] if imported else []
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                theirs = node.attr in ("get_text_config", "hf_text_config") or (
                    node.attr == "config" and owner == "model"
                )
                wrong += [f"{owner}.{node.attr}"] if theirs else []
            problems += [f"{path.relative_to(ROOT)}:{node.lineno} uses {name}" for name in wrong]
    complain(problems, "read_hf_config is the way to a checkpoint's numbers:")


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(PACKAGE, "tools")}
    problems = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES]
    complain(problems, f"a file has at most {MAX_FILE_LINES} lines:")


def test_no_function_is_too_long():
    problems = []
    for path in sources(PACKAGE, "tools"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    complain(problems, f"a function has at most {MAX_FUNCTION_LINES} lines:")


def test_no_function_has_too_many_parameters():
    """What belongs together travels as one record."""
    problems = []
    for path in sources(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                number = len([name for name in names if name not in ("self", "cls")])
                if number > MAX_PARAMETERS:
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {number} parameters")
    complain(problems, f"a function has at most {MAX_PARAMETERS} parameters:")


def test_the_loop_stays_one_file_to_read():
    assert len((ROOT / PACKAGE / "loop.py").read_text().splitlines()) < 200


def test_data_rewards_rl_and_layouts_import_on_bare_torch():
    wanted = [
        name
        for name, path in modules().items()
        if str(path.relative_to(ROOT / PACKAGE)).startswith(BARE) and "__main__" not in name
    ]
    # The weights package's __init__ offers the Megatron half too, so its pure modules are loaded without it.
    program = f"""
import importlib, sys, types
for blocked in ("megatron", "vllm", "ray"):
    sys.modules[blocked] = None
sys.modules["eureka_megatron.weights"] = package = types.ModuleType("eureka_megatron.weights")
package.__path__ = [{str(ROOT / PACKAGE / "weights")!r}]
for name in {wanted!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{{name}}: {{error}}")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    complain(done.stdout.splitlines(), "these must import without megatron, vllm and ray:")


def test_the_loop_can_be_imported_without_loading_vllm():
    """Engines load it in their own processes; trainer ranks and the driver never pay for it."""
    program = "import eureka_megatron.loop, sys; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "False"
