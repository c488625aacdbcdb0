"""Where things lie, settled once on the driver: absolute paths, and models of the hub as directories of its cache.

Workers of a cluster start in folders of their own, so relative paths end here. A model may be named as on the hub
(`Qwen/Qwen2.5-VL-7B-Instruct`, `…@REVISION`); it is looked for in huggingface_hub's cache first and downloaded when that is allowed.
The directory found names repository and commit, so a run's configuration and its model card record both.

    <cache>/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/cc594898137f460bfe9f0759e9844b3ce807cfb5
            repository                                      commit
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

from eureka_megatron.errors import ConfigError, UserError

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# Weights, configuration, tokenizer, processor; neither pickles nor code.
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
_VARIABLE = re.compile(r"(^|/)\$\{?[A-Za-z_]")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def from_home(text: str) -> str:
    """A path with its home folder, `~` or `~name`, spelled out: shells do that neither behind `=` nor in files.

    Raises:
        ConfigError: there is no such home folder, or a variable stands there that no shell has filled in.
    """
    path = text.strip() if text.lstrip().startswith("~") else text
    own = path in ("~", "~/") or path.startswith("~/")
    whole = path if own and os.environ.get("HOME") == "" else os.path.expanduser(path)
    if os.path.lexists(whole):
        return whole
    if whole.startswith("~"):
        raise ConfigError(f"{text!r}: there is no such home folder; write the whole path (./~ for a name with a tilde)")
    if _VARIABLE.search(whole):
        raise ConfigError(
            f"{text!r} holds a variable that no shell has filled in; write the path, ~ for the home folder"
        )
    return whole


def model_directory(name: Path | str, *, download: bool = True) -> Path:
    """The absolute directory of a model: one that exists, or that of a hub id. What is neither stays as it is, for its reader to refuse.

    download: whether what the cache lacks is fetched.

    Raises:
        UserError: the name has the form of a hub id, but the model is not in the cache and cannot be downloaded.
    """
    directory = absolute(Path(name))
    known = HUB_ID.fullmatch(str(name))
    if directory.exists() or known is None:
        return directory
    return _snapshot(known["repository"], known["revision"], download)


def hub_origin(directory: Path | str) -> tuple[str, str] | None:
    """(repository, commit) of a directory of the hub's cache. Example: ("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f…")."""
    path = Path(directory)
    kind, *names = path.parent.parent.name.split("--")
    if path.parent.name != "snapshots" or kind != "models" or not names:
        return None
    return "/".join(names), path.name


def absolute(path: Path) -> Path:
    return Path(from_home(str(path))).absolute()


def _snapshot(repository: str, revision: str | None, allowed: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    download = partial(snapshot_download, repository, revision=revision, allow_patterns=list(FILES))
    try:
        cached: str | None = download(local_files_only=True)
    # The first also where only files lack that nobody needs.
    except (LocalEntryNotFoundError, HFValidationError) as error:
        cached = getattr(error, "snapshot_path", None)
    lacking = "it is not in the cache"
    if cached:
        missing = missing_files(Path(cached))
        if not missing:
            return _told(repository, cached)
        lacking = f"the cache lacks {', '.join(missing)} of it"
    reason = "HF_HUB_OFFLINE is set" if allowed else "nothing is downloaded here"
    if allowed and not constants.HF_HUB_OFFLINE:
        try:
            return _told(repository, download())
        except Exception as error:  # of many kinds: names the hub does not know, tokens, proxies, networks, disks
            reason = " ".join(str(error).split())[:200]
    wanted = f" --revision {revision}" if revision else ""
    raise UserError(
        f"{repository} is neither a directory nor can it be had from the hub: {lacking}, and {reason}; where there is a network: "
        f"hf download {repository}{wanted} --local-dir DIR, then name DIR"
    )


def _told(repository: str, snapshot: str) -> Path:
    print(f"{repository}: {snapshot}", file=sys.stderr, flush=True)
    return Path(snapshot)


def missing_files(snapshot: Path) -> list[str]:
    """What an interrupted download left out: of config.json, the index and the shards it names."""
    if not (snapshot / "config.json").is_file():
        return ["config.json"]
    if (snapshot / _SINGLE).is_file():
        return []
    if not (snapshot / _INDEX).is_file():
        return [_INDEX]
    shards = set(json.loads((snapshot / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in shards if not (snapshot / name).is_file())
