"""A run's YAML file and its overrides as plain values, with text to the letter.

YAML makes numbers, dates and truth of `20251125`, `1e3`, `12:30` and `no`; where the schema (a pydantic model) asks for text, that is names,
paths and choices, they stay here what was written. Elsewhere numbers are those of YAML 1.2 and Python: `1e-6` is one, `1_000` is a thousand,
`010` is ten. Left out: references from key to key, which are resolved in `config`.
"""

import re
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from eureka_megatron.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_NOTHING = ("", "~", "null", "Null", "NULL")  # how YAML spells that there is no value
_TEXTS = ("str", "value", "merge")  # `=` and `<<` have kinds of their own
_SIGNS_AND_DIGITS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one with other numbers and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|\d[\d_]*)$"), _SIGNS_AND_DIGITS
)
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?$"), _SIGNS_AND_DIGITS
)


def read_yaml(text: str, schema: type[BaseModel], origin: str) -> Any:
    """What a file says: a dictionary, where it is a mapping. `origin` names it in messages.

    Raises:
        ConfigError: it is no YAML, has a key twice, or nothing where text must be.
    """
    return _parse(text, schema, "", origin)


def read_override(line: str, schema: type[BaseModel]) -> dict[str, Any]:
    """`section.key=value` as nested dictionaries. Example: "run.name=007" → {"run": {"name": "007"}}.

    Text is all that follows the sign, whatever YAML would make of it; only quotes around it do not belong to it.

    Raises:
        ConfigError: it is of another form, or the value is no YAML.
    """
    key, equals, text = line.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {line!r} is not of the form section.key=value")
    origin, parts = f"override {line!r}", key.split(".")
    annotation: Any = reduce(_inside, parts, schema)
    quoted_or_no_text = not _is_text(annotation) or text[:1] in ("'", '"')
    if quoted_or_no_text:
        value = _parse(text, annotation, key, origin)
    else:
        value = _nothing(text, annotation, key, origin) if text in _NOTHING else text
    return reduce(lambda inner, part: {part: inner}, reversed(parts), value)


def _parse(text: str, annotation: Any, key: str, origin: str) -> Any:
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _value(node, annotation, key, origin, loader)
    except yaml.YAMLError as error:
        hint = " (inside { } and [ ] a value with ${…} is quoted)" if "${" in text else ""
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}{hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is not valid YAML: an alias refers to itself") from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(node: yaml.Node, annotation: Any, key: str, origin: str, loader: Any) -> Any:
    if node.tag.removeprefix(_TAG) not in ("map", "seq", *_TEXTS, "int", "float", "bool", "null"):
        raise ConfigError(f"{origin}: {key}: the tag {node.tag.removeprefix(_TAG)!r} is not understood")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, annotation, key, origin)
    if isinstance(node, yaml.SequenceNode):
        inner = _inside(annotation, "")
        return [_value(item, inner, f"{key}.{place}", origin, loader) for place, item in enumerate(node.value)]
    names = [str(name.value) for name, _ in node.value if name.tag != _TAG + "merge"]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{origin}: found duplicate key {f'{key}.{twice}'.lstrip('.')}")
    loader.flatten_mapping(node)  # what `<<` brings in comes first
    entries = [(str(name.value), entry) for name, entry in node.value]
    return {
        name: _value(entry, _inside(annotation, name), f"{key}.{name}".lstrip("."), origin, loader)
        for name, entry in entries
    }


def _scalar(node: yaml.ScalarNode, annotation: Any, key: str, origin: str) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "null" and is_section(annotation) and not text:
        return {}  # a section whose keys are all commented out
    if kind == "null":
        return _nothing(text, annotation, key, origin) if _is_text(annotation) else None
    if kind in _TEXTS or _is_text(annotation):
        return text
    if kind == "bool":
        return yaml.SafeLoader.bool_values[text.lower()]
    digits = text.replace("_", "")
    try:
        return float(digits) if kind == "float" else int(digits, 16 if "x" in digits else 8 if "o" in digits else 10)
    except ValueError:  # thousands of digits, or `!!int` before a word
        return text


def _nothing(text: str, annotation: Any, key: str, origin: str) -> Any:
    """None, where that is a value; text must be written, and quoted when YAML takes it for nothing."""
    if NoneType not in get_args(annotation):
        quoted = f'; quote it if that is meant: "{text}"' if text else ""
        raise ConfigError(f"{origin}: {key}: needs a value, found {text or 'nothing'}{quoted}")
    return None


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_text(annotation: Any) -> bool:
    """Whether a value is text and nothing else, beside null."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _is_text(inner[0])
    if kind is Literal:
        return all(isinstance(choice, str) for choice in inner)
    if kind in (Union, UnionType):
        return all(_is_text(choice) for choice in inner if choice is not NoneType)
    return annotation in (str, Path)


def _inside(annotation: Any, key: str) -> Any:
    """The annotation of an entry; None of what the schema does not know."""
    if is_section(annotation):
        field = annotation.model_fields.get(key)
        return None if field is None else field.annotation
    inner = get_args(annotation)
    return {tuple: inner[:1], dict: inner[1:]}.get(get_origin(annotation), (None,))[0]
