"""`.env.example` names every setting with its default, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from config.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]


def _defaults(model: BaseModel, prefix: str = PREFIX) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in type(model).model_fields:
        value: Any = getattr(model, name)
        variable = f"{prefix}{name.upper()}"
        if isinstance(value, BaseModel):
            found |= _defaults(value, f"{variable}__")
        elif isinstance(value, SecretStr):
            found[variable] = value.get_secret_value()
        elif isinstance(value, bool):
            found[variable] = str(value).lower()
        else:
            found[variable] = str(value)
    return found


def test_every_setting_is_listed_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = dict(
        line.lstrip("#").split("=", 1) for line in lines if line.startswith(("#FOREBAY", "FOREBAY"))
    )
    assert listed == _defaults(Settings(_env_file=None))
