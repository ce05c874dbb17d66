"""The catalogue: the shipped one is sound, a broken one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import catalogue
from config.settings import SettingsError

ENTRY = """
[models.tiny]
kind = "chat"
source = "path:/models/tiny"
context_tokens = 128
"""


def test_the_shipped_models() -> None:
    models = catalogue.load()
    assert {spec.kind for spec in models.values()} == {"chat", "embedding"}
    assert all(spec.sha256 for spec in models.values())
    chat = models["smollm2-135m"]
    assert chat.endpoints == ("/v1/chat/completions", "/v1/completions", "/v1/responses")
    assert chat.output_limit <= chat.context_tokens


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("128", "0"), "models.tiny.context_tokens"),
        (('"chat"', '"image"'), "models.tiny.kind"),
        (('"path:/models/tiny"', '"pypi:tiny==1.0"'), "sha256 is required"),
        (('"path:/models/tiny"', '"hub:org/tiny@main"'), "models.tiny.source"),
        (("kind", "unknown = 1\nkind"), "models.tiny.unknown"),
        (("[models.tiny]", "[models.'a b']"), "name"),
        (("[models.tiny]", "[models.tiny"), "line"),
        (("kind", 'name = "other"\nkind'), "models.tiny"),
        (("kind", "threshold = 0.5\nkind"), "threshold is for models of the kind classifier"),
        (("kind", "dimensions = [64]\nkind"), "dimensions is for models of the kind embedding"),
        (
            ('kind = "chat"', 'kind = "classifier"\nthresholds = { bad = 2 }'),
            "models.tiny.thresholds.bad",
        ),
        (("kind", 'adapters = ["a"]\nkind'), "adapters: LoRA adapters can't be served"),
        (("kind", "devices = 2\nkind"), "devices above 1 need engine = 'vllm'"),
        (('kind = "chat"', 'kind = "embedding"\nengine = "vllm"'), "runs chat models only"),
        (("kind", "devices = 2\ndevice_memory_mib = 9\nkind"), "devices = 1 only"),
        (("kind", 'file = "m.gguf"\nkind'), "path:<folder>/<name>.gguf"),
    ],
)
def test_a_broken_entry_is_named(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(ENTRY.replace(*change))
    with pytest.raises(SettingsError, match=r"models\.toml") as caught:
        catalogue.load(str(path))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"models\.toml"):
        catalogue.load(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no-such"):
        catalogue.load(str(tmp_path / "no-such.toml"))
