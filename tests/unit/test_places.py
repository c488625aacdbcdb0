"""Models named as on the hub: the cache first, then a download by huggingface_hub's real client, then one line that says what to do."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from eureka_megatron.config import load_config
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.places import hub_origin, missing_files, model_directory
from eureka_megatron.release.card import model_card, run_card
from eureka_megatron.run.inputs import settle

COMMIT = "cc594898137f460bfe9f0759e9844b3ce807cfb5"
REPOSITORY = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_published(tmp_path_factory.mktemp("published") / "hf", max_shard_size="2MB")


@pytest.fixture
def cache(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the model: blobs, and a snapshot of links to them."""
    root = tmp_path / "hub"
    repository = root / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in published.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (repository / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_is_its_directory_in_the_cache(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert model_directory(REPOSITORY) == model_directory(f"{REPOSITORY}@{COMMIT}") == cache
    assert capsys.readouterr().err.splitlines()[0] == f"{REPOSITORY}: {cache}"
    assert hub_origin(cache) == (REPOSITORY, COMMIT)


def test_a_directory_goes_before_a_hub_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REPOSITORY).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_directory(REPOSITORY) == tmp_path / REPOSITORY
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_directory(f"~/{REPOSITORY}") == tmp_path / REPOSITORY


def test_what_cannot_be_had_offline_is_one_line_with_the_way_to_get_it(cache: Path) -> None:
    with pytest.raises(UserError) as told:
        model_directory("Qwen/Qwen2.5-VL-32B-Instruct@abc")
    assert "Qwen/Qwen2.5-VL-32B-Instruct is neither a directory" in str(told.value)
    assert "hf download Qwen/Qwen2.5-VL-32B-Instruct --revision abc --local-dir DIR" in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    shard = min(file.name for file in cache.glob("*.safetensors"))
    (cache / shard).unlink()
    assert missing_files(cache) == [shard]
    with pytest.raises(UserError, match=f"the cache lacks {shard} of it, and HF_HUB_OFFLINE is set"):
        model_directory(REPOSITORY)


def test_a_name_that_no_repository_can_have_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in (True, False):  # refused before anything is asked
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=r"runs/model\.\.7b is neither a directory nor"):
            model_directory("runs/model..7b")


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("convert", "inspect", "someone/model", env=env)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: someone/model is neither a directory nor can it be had from the hub: it is not in the cache"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_run_records_what_it_began_from(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"model": {"path": REPOSITORY}, "data": {"train": "train.jsonl"}, "run": {"output": "runs/one"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = settle(load_config("run.yaml", [f"algorithm.reference={REPOSITORY}"]))
    assert config.model.path == config.algorithm.reference == cache
    assert config.run.output == tmp_path / "runs" / "one"  # workers start in folders of their own
    card = run_card(config.model_dump(mode="json"))
    assert (card["base_model"], card["base_revision"]) == (REPOSITORY, COMMIT)
    assert card["hyperparameters"]["algorithm.reference"] == REPOSITORY
    text = model_card(card)
    assert f"base_model: {REPOSITORY}\n" in text
    assert f"- **Revision of the base model**: {COMMIT}\n" in text
    assert str(tmp_path) not in text


class Hub(BaseHTTPRequestHandler):
    """What a client asks of the hub to download a repository: its commit, the list of files, each file."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        if name in self.files:
            headers = {"ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(self.files[name], headers)
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/{COMMIT}"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            described = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(described).encode(), {"Content-Type": "application/json"})
        else:
            self.send_error(404)

    def answer(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def run(*words: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "eureka_megatron", *map(str, words)], capture_output=True, text=True, env=env
    )


def test_a_model_that_is_not_in_the_cache_is_downloaded_once(published: Path, tmp_path: Path) -> None:
    Hub.files = {file.name: file.read_bytes() for file in published.iterdir()} | {
        "evil.py": b"1",
        "pytorch_model.bin": b"2",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    first = run("convert", "inspect", REPOSITORY, env=env | {"HF_HUB_OFFLINE": "0"})
    server.shutdown()
    assert first.returncode == 0, first.stderr[-2000:]
    (snapshot,) = tmp_path.glob("hub/models--*/snapshots/*")
    assert {file.name for file in snapshot.iterdir()} == {
        file.name for file in published.iterdir()
    }  # neither code nor pickles
    again = run("convert", "inspect", REPOSITORY, env=env | {"HF_HUB_OFFLINE": "1"})
    assert (again.returncode, again.stdout) == (0, first.stdout)
