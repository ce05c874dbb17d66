"""Checkpoints from a hub, which is a small server here."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

from config.catalogue import ModelSpec
from config.settings import Models
from workers.checkpoints import SourceError, verify
from workers.sources import ensure

COMMIT = "ab" * 20
WEIGHTS = b"\0" * 100_000


@dataclass
class Hub:
    """One repository at one commit; `shown` is what its listing says of a file's content."""

    files: dict[str, bytes]
    shown: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            known = self.shown.get(name, content)
            blob = hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(known), "blobId": blob}
            if name.endswith((".safetensors", ".bin", ".gguf")):
                digest = hashlib.sha256(known).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(known), "pointerSize": 130}
            siblings.append(entry)
        return {"id": "org/model", "sha": self.commit, "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        """The same, as the hub lists folders."""
        return [
            {
                "type": "file",
                "path": each["rfilename"],
                "size": each["size"],
                "oid": each["blobId"],
                **({"lfs": {**each["lfs"], "oid": each["lfs"]["sha256"]}} if "lfs" in each else {}),
            }
            for each in self.listing()["siblings"]
        ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub({"config.json": b"{}", "model.safetensors": WEIGHTS, "evil.py": b"1 / 0"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            made.asked.append(path)
            if path == f"/api/models/org/model/revision/{COMMIT}":
                content, kind = json.dumps(made.listing()).encode(), "application/json"
            elif path == f"/api/models/org/model/tree/{COMMIT}":
                content, kind = json.dumps(made.tree()).encode(), "application/json"
            else:
                name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
                content, kind = made.files.get(name, b""), "application/octet-stream"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", made.commit)
            self.send_header("Connection", "close")
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield made
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def models(tmp_path: Any) -> Models:
    return Models(cache_dir=str(tmp_path / "cache"))


def _spec(**changes: Any) -> ModelSpec:
    fields = {"name": "m", "kind": "chat", "source": f"hub:org/model@{COMMIT}", "context_tokens": 8}
    return ModelSpec.model_validate(fields | changes)


def test_a_commit_is_fetched_checked_and_sealed(hub: Hub, models: Models) -> None:
    told: list[tuple[str, float]] = []
    folder = ensure(_spec(), models, progress=lambda _, stage, part: told.append((stage, part)))
    assert {path.name for path in folder.iterdir()} == {
        ".forebay.json",
        "config.json",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert verify(_spec(), folder) == []
    assert told[0] == ("download", 0.0)
    assert told[-2:] == [("download", 1.0), ("ready", 1.0)]


def test_pickles_are_refused_before_anything_is_fetched(hub: Hub, models: Models) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    with pytest.raises(SourceError, match=r"its weights are pickled \(pytorch_model.bin\)"):
        ensure(_spec(), models)
    assert not any("resolve" in path for path in hub.asked)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_files_than_the_commit_has(hub: Hub, models: Models, name: str) -> None:
    hub.shown[name] = bytes(reversed(hub.files[name])) if name == "config.json" else b"1" * 100_000
    with pytest.raises(SourceError, match=name):
        ensure(_spec(), models)


def test_the_catalogues_digest_holds_too(hub: Hub, models: Models) -> None:
    assert ensure(_spec(sha256=hashlib.sha256(WEIGHTS).hexdigest()), models)
    with pytest.raises(SourceError, match="it should be 000"):
        ensure(_spec(sha256="0" * 64), models)


def test_a_tag_that_looks_like_a_commit(hub: Hub, models: Models) -> None:
    hub.commit = "cd" * 20
    with pytest.raises(SourceError, match="is no commit"):
        ensure(_spec(), models)


def test_code_in_the_configuration(hub: Hub, models: Models) -> None:
    hub.files["config.json"] = b'{"auto_map": {"AutoModel": "evil.Evil"}}'
    with pytest.raises(SourceError, match="auto_map"):
        ensure(_spec(), models)


def test_a_gguf_file_that_is_not_there(hub: Hub, models: Models) -> None:
    with pytest.raises(SourceError, match=r"has no m\.gguf"):
        ensure(_spec(file="m.gguf"), models)


def test_a_hub_out_of_reach(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=f"m: can't fetch org/model@{COMMIT}: "):
        ensure(_spec(), models)
    huggingface_hub.close_session()
