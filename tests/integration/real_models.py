"""The models of the shipped catalogue, fetched once into the usual cache."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import pytest

from config import catalogue
from config.catalogue import ModelSpec
from config.settings import Models
from workers.sources import SourceError, ensure


@lru_cache
def _fetched(name: str) -> tuple[ModelSpec, Path | None, str]:
    spec = catalogue.load()[name]
    try:
        return spec, ensure(spec, Models()), ""
    except SourceError as error:
        return spec, None, str(error)


def real_model(name: str, **changes: object) -> tuple[ModelSpec, Path]:
    """Catalogue entry (with `changes`) and folder; skips where the model can't be had."""
    spec, folder, problem = _fetched(name)
    if folder is None:
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return spec.model_copy(update=changes), folder
