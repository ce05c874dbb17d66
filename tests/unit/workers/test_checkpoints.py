"""What is taken as a checkpoint, and what is noticed later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from config.catalogue import ModelSpec
from workers.checkpoints import MANIFEST, SourceError, examine, seal, verify


def _spec(**changes: Any) -> ModelSpec:
    fields = {"name": "m", "kind": "chat", "source": f"hub:o/m@{'a' * 40}", "context_tokens": 8}
    return ModelSpec.model_validate(fields | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_code_of_its_own(folder: Path) -> None:
    examine(_spec(), folder)
    config = {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="auto_map"):
        examine(_spec(), folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_pickled_weights(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"cos\nsystem")
    examine(_spec(), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=rf"m: its weights are pickled \({name}\)"):
        examine(_spec(), folder)


def test_an_adapter_is_no_model(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(SourceError, match="is a LoRA adapter; merge it into its model"):
        examine(_spec(), folder)


def test_a_sealed_folder_is_held_to_its_digests(folder: Path) -> None:
    assert verify(_spec(), folder) == [
        f"m: the digests of {folder} can't be read: remove it and pull again"
    ]
    seal(folder)
    assert verify(_spec(), folder) == []
    assert set(json.loads((folder / MANIFEST).read_text())) == {
        "config.json",
        "1_Pooling/config.json",
        "model.safetensors",
    }
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    said = verify(_spec(), folder)
    assert len(said) == 3
    assert "tokenizer.json was not there" in said[0]
    assert any("config.json is missing" in line for line in said)
    assert any("SHA-256 of model.safetensors is" in line for line in said)


def test_a_folder_used_where_it_lies_is_held_to_the_catalogue(folder: Path) -> None:
    source = f"path:{folder}"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert verify(_spec(source=source), folder) == []
    assert verify(_spec(source=source, sha256=digest), folder) == []
    (said,) = verify(_spec(source=source, sha256="0" * 64), folder)
    assert f"is {digest}, it should be 000" in said
