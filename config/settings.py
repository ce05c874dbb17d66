"""The settings tree, read once from the environment and `.env`, and frozen.

Every field is `FOREBAY_<SECTION>__<FIELD>`; the sections stand in `config/sections/`. A value that
can't be used stops the start with one line that names the variable, the value and what is allowed;
secrets are never shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as _SourceError

from config.sections.front import Api, Auth, Batches, Jwt, Webhooks
from config.sections.processes import Flower, Log, Simulated, Worker
from config.sections.queue import Answers, Queue
from config.sections.stores import Database, Files, Models, Redis

__all__ = [
    "PREFIX",
    "Answers",
    "Api",
    "Auth",
    "Batches",
    "Database",
    "Files",
    "Flower",
    "Jwt",
    "Log",
    "Models",
    "Queue",
    "Redis",
    "Settings",
    "SettingsError",
    "Simulated",
    "Webhooks",
    "Worker",
    "load",
]

PREFIX = "FOREBAY_"


class SettingsError(Exception):
    """The environment can't be used; the message is one line, fit to be printed."""


class Settings(BaseSettings):
    """Everything a process of Forebay can be told from outside."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file=".env",
        env_file_encoding="utf-8",
        frozen=True,
        extra="ignore",
        validate_default=True,
        hide_input_in_errors=True,
    )

    #: `production` refuses what only fits a laptop (an empty pepper, Flower without a password).
    env: Literal["development", "production"] = "development"
    #: Where `forebay up` keeps its Redis, database, secrets and addresses.
    data_dir: Path = Path(".forebay")
    redis: Redis = Redis()
    database: Database = Database()
    api: Api = Api()
    auth: Auth = Auth()
    jwt: Jwt = Jwt()
    queue: Queue = Queue()
    files: Files = Files()
    batches: Batches = Batches()
    worker: Worker = Worker()
    simulated: Simulated = Simulated()
    flower: Flower = Flower()
    models: Models = Models()
    webhooks: Webhooks = Webhooks()
    answers: Answers = Answers()
    log: Log = Log()


def load(**overrides: Any) -> Settings:
    """Read the environment and `.env`; `SettingsError` has one line for the first bad value."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError(_first_problem(error)) from None
    except _SourceError as error:
        raise SettingsError(f"the environment can't be read: {error}") from None


def _first_problem(error: ValidationError) -> str:
    """`FOREBAY_API__PORT='http': input should be a valid integer` for the first of the problems."""
    problem = error.errors(include_url=False, include_context=False)[0]
    path = tuple(str(part) for part in problem["loc"])
    name = PREFIX + "__".join(part.upper() for part in path)
    shown = "(hidden)" if _is_secret(path) else _value_of(name)
    allowed = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}={shown}: {allowed}"


def _is_secret(path: tuple[str, ...]) -> bool:
    """Whether the value may be one: a secret by a wrong name is still a secret."""
    model: Any = Settings
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            break
        model = fields[part].annotation
    fields = getattr(model, "model_fields", {})
    return model is SecretStr or any(each.annotation is SecretStr for each in fields.values())


def _value_of(name: str) -> str:
    import os

    from dotenv import dotenv_values

    value = os.environ.get(name)
    if value is None:
        value = dotenv_values(".env").get(name)
    return repr(value) if value is not None else "(not set)"
