"""Where things are kept: jobs, accounts, files, models."""

from __future__ import annotations

import re

from pydantic import SecretStr, field_validator

from config.sections.base import Positive, Seconds, Section
from config.sentinel import SentinelUrl


class Redis(Section):
    """Where jobs live: one Redis >= 7 or Valkey primary."""

    #: `redis://`, `rediss://` or `unix://` URL, or with Sentinels
    #: `redis+sentinel://host:port,host:port/service/db`; a password in it is never printed.
    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    #: Longest wait for one answer.
    timeout_s: Seconds = 5.0
    #: Connections one API process may hold for commands.
    max_connections: Positive = 64

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if SentinelUrl.matches(url):
            SentinelUrl.parse(url)
        elif not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                "must start with redis://, rediss://, unix://, redis+sentinel:// or "
                "rediss+sentinel://"
            )
        return value


class Database(Section):
    """Where accounts live: SQLite by default, PostgreSQL in production."""

    #: SQLAlchemy URL: `sqlite:///path` or `postgresql+psycopg://…`.
    url: SecretStr = SecretStr("sqlite:///.forebay/accounts.db")

    @field_validator("url")
    @classmethod
    def _known_backend(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("must start with sqlite:/// or postgresql+psycopg://")
        return value


class Files(Section):
    """Uploaded files and results of batches, on disk or in a bucket."""

    #: Folder; empty means `files` in the data folder. API processes that share a database share it;
    #: with a bucket it only holds what is being written.
    dir: str = ""
    #: `s3://bucket/prefix`: files are kept in a bucket of an S3-compatible store (extra `s3`).
    #: Empty: in the folder.
    url: str = ""
    #: Of the store; empty is AWS. `http://` only where the way there is trusted.
    s3_endpoint: str = ""
    s3_region: str = "us-east-1"
    #: Empty: credentials come from where AWS's own tools look for them.
    s3_access_key_id: str = ""
    s3_secret_access_key: SecretStr = SecretStr("")
    #: Longest wait for one answer of the store.
    s3_timeout_s: Seconds = 30.0
    #: Largest upload; above it 413.
    max_bytes: Positive = 200 * 1024 * 1024
    #: Bytes a tenant may keep; uploads beyond are refused, results of batches are not.
    quota_bytes: Positive = 10 * 1024 * 1024 * 1024
    #: Longest an upload may take, however steadily it comes.
    upload_timeout_s: Seconds = 3600.0

    @field_validator("url")
    @classmethod
    def _is_a_bucket(cls, value: str) -> str:
        if value and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,62}(/[A-Za-z0-9._-]+)*/?", value):
            raise ValueError("must be s3://bucket or s3://bucket/prefix")
        return value

    @field_validator("s3_endpoint")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with https:// or http://")
        return value


class Models(Section):
    """Catalogue and model cache."""

    #: The catalogue file; empty means the one that ships with Forebay.
    catalogue: str = ""
    #: Converted weights; empty means `~/.cache/forebay/models`.
    cache_dir: str = ""
