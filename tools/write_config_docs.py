"""Write docs/configuration.md from eureka_megatron/config.py (and layout.py): every key with its type, bounds, default and comment.

Usage: python tools/write_config_docs.py [--check]     (--check writes nothing and exits 1 when the page is out of date)
"""

import ast
import inspect
import itertools
import sys
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eureka_megatron import config
from eureka_megatron.yaml_values import is_section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

A run is one YAML file plus overrides on the command line: `eureka train run.yaml optimizer.lr=3e-4 data.media=[pictures]`.
Only `model.path` and `data.train` are required. An unknown key, a key that stands twice, a wrong type or a combination that cannot work is
refused before anything starts.

Text, that is names, paths and choices, stays what is written, also where YAML would make a number, a date or truth of it: `run.name=007`,
`1e3`, `no`. `null` and nothing at all are no text; a name that is spelled so is quoted. In an override all that follows the sign belongs to the text.
Numbers may be written `1e-6` and `1_000`; `010` is ten. `~` at the head of a path is the home folder; environment variables are the shell's
business, and one that is left in a path is refused.

Keys may refer to each other, and to what they are when they are not given: `output: runs/${run.name}`. Resolvers such as `${oc.env:…}` are refused.

This page is written by `tools/write_config_docs.py` from the comments in `eureka_megatron/config.py` and `layout.py`; edit those.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def main(arguments: list[str]) -> int:
    page = render()
    if arguments == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        if not current:
            print(f"error: {PAGE.name} is out of date; run python tools/write_config_docs.py", file=sys.stderr)
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for path, section in _sections(config.RunConfig, ""):
        comments = _comments(section)
        # What must be given comes first, also before what a section inherits.
        fields = sorted(section.model_fields.items(), key=lambda item: not item[1].is_required())
        rows = [
            f"| `{name}` | {_type(field)} | {_default(field)} | {comments.get(name, '')} |"
            for name, field in fields
            if not is_section(field.annotation)
        ]
        parts.append("\n".join([f"## {path}\n", "| key | type | default | |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _sections(parent: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    """Sections in the order of declaration, `algorithm.filter` after `algorithm`."""
    found = []
    for name, field in parent.model_fields.items():
        if is_section(field.annotation):
            found += [(prefix + name, field.annotation), *_sections(field.annotation, f"{prefix}{name}.")]
    return found


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """The comment lines just above each field, where the class or one it inherits from declares it."""
    found: dict[str, str] = {}
    for owner in reversed([base for base in section.__mro__ if base.__module__.startswith("eureka_megatron")]):
        lines = inspect.getsource(owner).splitlines()
        for item in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                above = [
                    *itertools.takewhile(lambda line: line.strip().startswith("#"), reversed(lines[: item.lineno - 1]))
                ]
                text = " ".join(line.strip().lstrip("# ") for line in reversed(above))
                found[item.target.id] = (text or found.get(item.target.id, "")).replace("|", "\\|")
    return found


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(rule, name)
    ]
    return ", ".join([_name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    """`Literal["a", "b"] | None` → "`a`, `b` or null"; `tuple[Path, ...]` → "list of path"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _name(inner[0])
    if origin is typing.Literal:
        return _either([f"`{value}`" for value in inner])
    if origin in (typing.Union, types.UnionType):
        return _either([_name(one) for one in inner])
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_name(inner[0])}"
        return f"{len(inner)} × {_name(inner[0])}"
    if origin is dict:
        return f"mapping to {_name(inner[1])}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", type(None): "null"}
    return names[annotation]


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    value = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n")
    return f"`{text.strip()}`"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
