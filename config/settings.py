"""The settings tree, read once from the environment and `.env`, and frozen.

Every field is `FOREBAY_<SECTION>__<FIELD>`. A value that can't be used stops the start with one
line that names the variable, the value and what is allowed; secrets are never shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as _SourceError

from config.sentinel import SentinelUrl

PREFIX = "FOREBAY_"

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(gt=0, le=1)]


class SettingsError(Exception):
    """The environment can't be used; the message is one line, fit to be printed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Redis(_Section):
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


class Database(_Section):
    """Where accounts live: SQLite by default, PostgreSQL in production."""

    #: SQLAlchemy URL: `sqlite:///path` or `postgresql+psycopg://…`.
    url: SecretStr = SecretStr("sqlite:///.forebay/accounts.db")

    @field_validator("url")
    @classmethod
    def _known_backend(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("must start with sqlite:/// or postgresql+psycopg://")
        return value


class Api(_Section):
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: Port = 8080
    #: API processes that share the port (SO_REUSEPORT).
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    #: Own listener for `/metrics`; 0 leaves it off (the guarded route on the main port stays).
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0
    #: Largest request body; above it 413.
    max_body_bytes: Positive = 10 * 1024 * 1024
    #: Longest `?wait=` and `Prefer: wait=`.
    max_wait_s: Seconds = 60.0
    #: Longest a synchronous call may wait for its job.
    sync_timeout_s: Seconds = 600.0
    #: Longest a request's body may take to arrive; after it 408.
    read_timeout_s: Seconds = 60.0
    #: A reader that takes nothing of its answer for this long is cut off.
    write_timeout_s: Seconds = 30.0
    #: An idle connection is closed after this; longer than what a proxy in front keeps its own.
    keepalive_timeout_s: Seconds = 75.0
    #: Origins whose pages may call the API, separated by commas, or `*`; empty: none.
    cors_origins: str = ""
    #: How long a job with `store: false` can be read once it has ended.
    unstored_ttl_s: Positive = 300
    #: How long a stored response can be read and continued once it has ended.
    response_ttl_s: Positive = 604_800
    #: A conversation is kept for this long after its last change.
    conversation_ttl_s: Positive = 2_592_000
    #: Conversations that a tenant may have at a time.
    max_conversations: Positive = 10_000
    #: Time given to open requests at shutdown.
    shutdown_grace_s: Seconds = 8.0
    #: Interval of `: ping` comments on an event stream.
    ping_interval_s: Seconds = 15.0

    @property
    def origins(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, self.cors_origins.split(","))))


class Auth(_Section):
    """Credentials."""

    #: Mixed into every stored key digest (HMAC-SHA256). Required outside `forebay up`.
    pepper: SecretStr = SecretStr("")
    #: Counts upwards when the pepper is changed; stored beside each digest.
    pepper_version: Positive = 1
    #: Pepper of the version before, while keys stored with it are still to be accepted.
    previous_pepper: SecretStr = SecretStr("")
    #: Middle part of new keys: `fb_<key_env>_…`.
    key_env: Annotated[str, Field(pattern=r"^[a-z]{2,10}$")] = "live"
    #: Longest a change made by another process stays unseen when its notice was lost.
    refresh_s: Annotated[float, Field(gt=0, le=5)] = 3.0
    #: Failed logins an address, and a key prefix, may have in each API process; beyond them 429.
    failures_per_minute: Positive = 60


class Jwt(_Section):
    """Access tokens (RFC 9068) of one issuer, accepted beside API keys; off while all are empty."""

    #: Exact `iss` and one value of `aud` of a token.
    issuer: str = ""
    audience: str = ""
    #: The issuer's key as PEM (a line break may be written as `\n`), or a JWKS file; RSA, P-256
    #: and Ed25519 keys verify RS256, ES256 and EdDSA, and nothing else is accepted.
    public_key: str = ""
    jwks_file: str = ""
    #: Clock difference to the issuer that is forgiven.
    leeway_s: Annotated[float, Field(ge=0, le=60)] = 5.0

    @property
    def enabled(self) -> bool:
        return bool(self.issuer)

    @model_validator(mode="after")
    def _complete(self) -> Jwt:
        given = [bool(self.issuer), bool(self.audience), bool(self.public_key or self.jwks_file)]
        if any(given) != all(given) or (self.public_key and self.jwks_file):
            raise ValueError("needs ISSUER, AUDIENCE and one of PUBLIC_KEY and JWKS_FILE, or none")
        return self


class Queue(_Section):
    """Leases, bounds and lifetimes of jobs."""

    #: `amqp://` or `amqps://` URL of a RabbitMQ over which workers get their turns; empty: over the
    #: Redis that holds the jobs, at 1.5 times the rate. A password in it is never printed.
    broker_url: SecretStr = SecretStr("")
    #: A job whose worker is silent for this long is given to another one.
    lease_ttl_s: Seconds = 10.0
    renew_every_s: Seconds = 3.0
    #: Jobs taken by one claim at most.
    claim_batch: Annotated[int, Field(ge=1, le=64)] = 4
    #: Part of a worker's slots that batch jobs may fill (one slot at least); the rest stays free
    #: for more urgent ones, which then needn't wait for a batch job to end.
    batch_slots: Annotated[float, Field(ge=0.1, le=1)] = 0.75
    #: Starts a job may have, crashes included.
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    #: How long a finished job can be read.
    result_ttl_s: Positive = 86_400
    #: Queued jobs one model queue may hold, all tenants together.
    max_queued_total: Positive = 1_000_000
    #: Replicas that must have a new job before it is answered with 202; without them 503.
    await_replicas: Annotated[int, Field(ge=0, le=16)] = 0
    #: Parts of that at which new jobs of a band are refused: the least urgent first.
    shed_batch_at: Part = 0.8
    shed_standard_at: Part = 0.9
    shed_interactive_at: Part = 1.0
    #: Policy of a tenant that has none of its own.
    default_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    default_max_in_flight: Positive = 64
    default_max_queued: Positive = 10_000

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url and not url.startswith(("amqp://", "amqps://")):
            raise ValueError("must be empty or start with amqp:// or amqps://")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Queue:
        if not self.shed_batch_at <= self.shed_standard_at <= self.shed_interactive_at:
            raise ValueError("SHED_BATCH_AT, SHED_STANDARD_AT and SHED_INTERACTIVE_AT must rise")
        return self


class Files(_Section):
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


class Batches(_Section):
    """Batches of requests from a file."""

    #: Batches one API process drives at once; 0: it leaves them to others.
    concurrency: Annotated[int, Field(ge=0, le=64)] = 4
    #: Jobs of one batch that wait or run at once, at most.
    window: Annotated[int, Field(ge=1, le=2_000)] = 256
    #: Lines of one batch.
    max_lines: Positive = 50_000
    #: Batches of a tenant that have not ended.
    max_unfinished: Positive = 100
    #: How long the job of a line can be read after its end; one that nobody collected within this
    #: time, because no API process ran, is run again.
    result_ttl_s: Annotated[int, Field(ge=60)] = 3600
    #: A batch whose process is silent for this long goes to another one.
    lease_s: Annotated[float, Field(ge=1, le=600)] = 10.0
    #: How often a process looks for batches that nobody drives.
    poll_s: Annotated[float, Field(gt=0, le=60)] = 2.0


class Worker(_Section):
    """One Celery worker process."""

    #: `transformers`, or `simulated` (no model; says so everywhere).
    engine: Literal["transformers", "simulated"] = "transformers"
    #: Interpreter of workers whose model has `engine = "vllm"`; empty: the launcher's own.
    vllm_python: str = ""
    #: Time for running jobs to finish after SIGTERM before they are handed back.
    grace_s: Seconds = 8.0
    #: Own listener for `/metrics`; 0 leaves it off.
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0
    #: torch threads; 0 lets torch decide.
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    #: Processors the process is bound to, such as `0-3,8`; empty leaves it free.
    cpus: Annotated[str, Field(pattern=r"^(\d+(-\d+)?(,\d+(-\d+)?)*)?$")] = ""
    #: Memory it may take of its CUDA device; 0: all that is free.
    device_memory_mib: Annotated[int, Field(ge=0)] = 0
    #: What `forebay workers` shows as the place it runs; empty: what the process finds out.
    place: Annotated[str, Field(max_length=200)] = ""
    #: On the CPU a step that generates answers takes no more of new prompts than fits this time, so
    #: that streams go on evenly beside long prompts; more of it serves prompts sooner.
    max_step_ms: Annotated[float, Field(ge=1, le=10_000)] = 120.0
    #: Attention on the CPU: `compiled` for AVX-512 (built at first use, needs a C++ compiler),
    #: `torch`, or `auto`, which compiles where it can.
    kernel: Literal["auto", "torch", "compiled"] = "auto"
    #: Longest a token delta waits for others before it is published.
    flush_interval_ms: Positive = 20
    #: Engine steps may stand still for this long while jobs run before the engine counts as dead.
    stall_s: Seconds = 60.0
    #: Celery task events, which Flower's task page shows; they cost throughput above ~1,000 jobs/s.
    task_events: bool = True


class Simulated(_Section):
    """Step-time model of the simulated engine; says nothing about a real model.

    A step takes `step_ms + step_ms_per_sequence * running + prefill_ms_per_token * new prompt
    tokens` and gives every running sequence one token.
    """

    step_ms: Annotated[float, Field(ge=0)] = 20.0
    step_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.3
    prefill_ms_per_token: Annotated[float, Field(ge=0)] = 0.05
    #: Sequences in one step; 0 takes the model's `max_batch`.
    capacity: Annotated[int, Field(ge=0, le=4096)] = 0


class Flower(_Section):
    """The operations console."""

    host: str = "127.0.0.1"
    port: Port = 5555
    #: `user:password`; required when `host` is not a loopback address.
    basic_auth: SecretStr = SecretStr("")
    #: Tenants shown as rows of their own.
    top_tenants: Annotated[int, Field(ge=0, le=1000)] = 20


class Models(_Section):
    """Catalogue and model cache."""

    #: The catalogue file; empty means the one that ships with Forebay.
    catalogue: str = ""
    #: Converted weights; empty means `~/.cache/forebay/models`.
    cache_dir: str = ""


class Webhooks(_Section):
    """Messages to the tenants' own servers."""

    #: Secrets of endpoints are derived from it; empty: from the pepper, which then can't be changed
    #: without changing them.
    key: SecretStr = SecretStr("")
    #: In development: 127.0.0.1 and ::1 may be sent to.
    allow_loopback: bool = False
    #: Longest one attempt may take.
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    #: Seconds before each attempt, counted from the one before.
    retry_s: str = "0 5 300 1800 7200 18000 36000 50400 72000 86400"
    #: An endpoint that fails for this long is disabled.
    disable_after_s: Seconds = 432_000.0
    #: Endpoints of a tenant.
    max_endpoints: Annotated[int, Field(ge=1, le=100)] = 10
    #: Deliveries being sent: in all (a tenant has half of it), and to one endpoint.
    max_in_flight: Annotated[int, Field(ge=1, le=512)] = 32
    max_in_flight_per_endpoint: Annotated[int, Field(ge=1, le=512)] = 8
    #: Deliveries that may wait for one endpoint; what comes then is discarded, and logged as such.
    max_pending: Positive = 10_000
    #: Largest message; an output that makes it larger is left out.
    max_body_bytes: Annotated[int, Field(ge=4096, le=1_048_576)] = 20_000
    #: Deliveries in the log of an endpoint, and how long ended ones are kept.
    log_entries: Annotated[int, Field(ge=1, le=10_000)] = 1000
    log_ttl_s: Positive = 604_800

    @field_validator("retry_s")
    @classmethod
    def _waits(cls, value: str) -> str:
        try:
            waits = [float(part) for part in value.split()]
        except ValueError:
            raise ValueError("must be numbers separated by blanks") from None
        if not 1 <= len(waits) <= 50 or not all(0 <= wait <= 604_800 for wait in waits):
            raise ValueError("must be 1 to 50 numbers from 0 to 604800")
        return value

    @property
    def retry_plan(self) -> tuple[float, ...]:
        return tuple(float(part) for part in self.retry_s.split())


class Answers(_Section):
    """Answers kept for the same request of the same tenant; which models: `keep_answers` there."""

    #: 0 keeps none.
    ttl_s: Annotated[float, Field(ge=0)] = 3_600.0
    #: Answers of one tenant; the oldest go first.
    most: Positive = 1_000
    #: A longer one isn't kept.
    max_bytes: Positive = 65_536


class Log(_Section):
    """Log lines on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    #: `auto` is readable on a terminal and JSON elsewhere.
    format: Literal["auto", "json", "console"] = "auto"


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
