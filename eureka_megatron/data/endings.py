"""The chat template of a checkpoint, wherever its files hold it, and the tokens that end a response, with what names each.

Fine-tunes name ends in several files that often disagree: a base model's tokenizer and configurations say "<|endoftext|>", while its chat
template closes every turn with "<|im_end|>", and that is what such a model says when it has answered. So the template is asked: it is applied to
an assistant's turn, and the token behind the text counts, whatever the other files name. What they name counts as well, as it does in vLLM.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, token_ids

# In transformers' order: the first that holds a template is the one.
_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
_OTHERS = ("tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json")
_MORE = "additional_chat_templates"
_SAID = "eureka"  # what the assistant says in the turn that shows its end


@dataclass(frozen=True)
class Ends:
    """Tokens that end a response. Example: Ends({151645: "closes an assistant's turn in the chat template of chat_template.json"}, {})."""

    reasons: dict[int, str]  # by token; the first is what closes an answer to imitate
    passed_over: dict[int, str]  # named, but no token of the model


def read_template(model_dir: Path) -> tuple[str, Path]:
    """The chat template and the file that holds it; of several named ones the default.

    Raises:
        UserError: there is none, there are only others, or a file cannot be read.
    """
    names: list[str] = [path.stem for path in sorted((model_dir / _MORE).glob("*.jinja"))]
    for path in (model_dir / name for name in _FILES):
        if not path.is_file():
            continue
        found: Any = _text(path) if path.suffix == ".jinja" else _object(path).get("chat_template")
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if isinstance(found, dict):
            names += map(str, found)
            found = found.get("default")
        if found and not isinstance(found, str):
            raise UserError(f"{path}: chat_template must be text or a list of named templates, found {found!r:.80}")
        if found:
            return found, path
    if names:
        raise UserError(
            f"{model_dir} has no default chat template, only others by name: {', '.join(sorted(set(names)))}"
        )
    raise UserError(
        f"{model_dir} has no chat template: neither chat_template.jinja, chat_template.json nor tokenizer_config.json holds one"
    )


def check_files(model_dir: Path) -> None:
    """Raises UserError, naming it, when a file of tokenizer, processors or template cannot be read: transformers often does not say which."""
    for path in (model_dir / name for name in (*_FILES, *_OTHERS)):
        if path.is_file():
            values = _text(path) if path.suffix == ".jinja" else _object(path)
            if path.name == "chat_template.json" and "chat_template" not in values:
                raise UserError(f"{path} has no key chat_template")


def response_ends(model_dir: Path, tokenizer: Any, config: QwenVLConfig) -> Ends:
    """What ends a response of this checkpoint: what closes an assistant's turn in its chat template, then what its files name.

    Raises:
        UserError: nothing names an end, or a file or the template cannot be read.
    """
    settings = model_dir / "generation_config.json"
    generation = _object(settings).get("eos_token_id") if settings.is_file() else None
    try:
        generated = token_ids(generation)
    except UserError as error:
        raise UserError(f"{settings}: eos_token_id: {error}") from None
    template, path = read_template(model_dir)
    named = {
        f"closes an assistant's turn in the chat template of {path.name}": token_ids(
            _turn_end(template, path, tokenizer)
        ),
        "eos_token of the tokenizer": token_ids(tokenizer.eos_token_id),
        "eos_token_id of generation_config.json": generated,
        "eos_token_id of config.json": config.eos_token_ids,
    }
    reasons: dict[int, str] = {}
    for reason, tokens in named.items():
        for token in tokens:
            reasons[token] = f"{reasons[token]}, {reason}" if token in reasons else reason
    known = {token: reason for token, reason in reasons.items() if 0 <= token < config.text_config.vocab_size}
    if not known:
        raise UserError(
            f"{model_dir}: nothing says where a response ends: the chat template of {path.name} closes an assistant's turn with no "
            "token of its own, and neither the tokenizer's eos_token nor eos_token_id in generation_config.json or config.json is set"
        )
    return Ends(known, {token: reason for token, reason in reasons.items() if token not in known})


def _turn_end(template: str, path: Path, tokenizer: Any) -> int | None:
    """The token that the template puts behind an assistant's text, None where that is no token of its own."""
    failure: Exception | None = None
    for said in (_SAID, [{"type": "text", "text": _SAID}]):  # templates may take one form of content only
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        try:
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        except Exception as error:  # jinja's, or whatever the template raises
            failure = failure or error
            continue
        _, found, rest = text.rpartition(_SAID)
        if found:
            tokens = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
            return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None
    if failure is not None:
        line = getattr(failure, "lineno", None)
        where = f", line {line}" if line else ""
        raise UserError(
            f"{path}: the chat template cannot be applied: {type(failure).__name__}{where}: {failure}".splitlines()[0]
        )
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values
