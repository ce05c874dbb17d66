"""The HTTP front, its credentials, and what it does in a tenant's name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr, field_validator, model_validator

from config.sections.base import Port, Positive, Seconds, Section


class Api(Section):
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


class Auth(Section):
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


class Jwt(Section):
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


class Batches(Section):
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


class Webhooks(Section):
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
