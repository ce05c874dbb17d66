"""What makes a model another one, as far as its answers go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from config.catalogue import ModelSpec
from config.settings import Settings
from workers.identity import fingerprint

REAL = Settings.model_validate({"worker": {"engine": "transformers"}})


def _spec(folder: Path, **more: Any) -> ModelSpec:
    fields = {"name": "m", "kind": "chat", "source": f"path:{folder}", "context_tokens": 64}
    return ModelSpec.model_validate(fields | more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_output_tokens": 8},
        {"context_tokens": 32},
        {"engine": "vllm"},
        {"dtype": "float32"},
    ],
)
def test_what_changes_answers_counts(folder: Path, change: dict[str, Any]) -> None:
    assert fingerprint(_spec(folder), REAL) != fingerprint(_spec(folder, **change), REAL)


def test_where_and_how_it_runs_does_not(folder: Path) -> None:
    moved = _spec(folder, workers=4, max_batch=2, description="the same")
    assert fingerprint(_spec(folder), REAL) == fingerprint(moved, REAL)


def test_weights_that_were_replaced_are_another_model(folder: Path) -> None:
    before = fingerprint(_spec(folder), REAL)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert fingerprint(_spec(folder), REAL) != before


def test_what_is_simulated_is_no_model_s(folder: Path) -> None:
    made_up = Settings.model_validate({"worker": {"engine": "simulated"}})
    assert fingerprint(_spec(folder), made_up) != fingerprint(_spec(folder), REAL)
