"""One HTML file: style and script from `static/`, plotly from its package, the runs' data compressed, each step's rollouts by themselves.

All that a run or a model has said reaches the page inside base64 and is put into it as text, never as markup; besides, the page's own policy
allows no script but its own and no connection to anywhere.
"""

import base64
import gzip
import importlib.util
import os
import secrets
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from eureka_megatron.errors import ConfigError
from eureka_megatron.report.contents import read_run
from eureka_megatron.report.samples import StoredRollouts, packed

SCRIPTS = ("base.js", "charts.js", "figures.js", "rollouts.js", "tables.js", "main.js")


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or of two beside each other. → its path, by default report.html in the first one's folder.

    It is there whole or not at all. UserError: a folder is none of a run.
    """
    if len(folders) > 2:
        raise ConfigError(f"eureka report takes one run's folder or two, found {len(folders)}")
    output = output or folders[0] / "report.html"
    runs = [read_run(folder) for folder in folders]
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; it must be a file, such as {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.partial")
    nonce = secrets.token_urlsafe(12)
    try:
        with unfinished.open("w", encoding="utf-8") as page:
            head, tail = _static("page.html").replace("NONCE", nonce).split("DATA\n")
            page.write(head.replace("STYLE", _static("page.css")))
            for name, text in _blocks(folders, runs):
                page.write(f'<script type="text/plain" id="{name}">{text}</script>\n')
            page.write(tail.replace("SCRIPT", "\n".join(map(_static, SCRIPTS))))
        os.replace(unfinished, output)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return output


def _blocks(folders: Sequence[Path], runs: Sequence[dict]) -> Iterator[tuple[str, str]]:
    """(id of the element, its text) of all data. What is small and looked at first comes last, when all problems are known."""
    yield "plotly", base64.b64encode(gzip.compress(_plotly().read_bytes(), 9, mtime=0)).decode()
    shown: set[str] = set()
    for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        stored = StoredRollouts(folder)
        for step, found in stored.steps():
            yield f"step-{number}-{step}", packed(found)
        for key in sorted(stored.pictures - shown):
            if url := stored.picture(key):
                yield f"picture-{key}", url
        shown |= stored.pictures
        yield f"index-{number}", packed(stored.index)
        run["problems"] += stored.problems
    yield "runs", packed(runs)


def _static(name: str) -> str:
    return files("eureka_megatron.report").joinpath("static", name).read_text(encoding="utf-8")


def _plotly() -> Path:
    """plotly.js as its Python package brings it, which need not be imported for that."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"
