"""From a checked request to a job: which model, how urgent, how much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import orjson
from aiohttp import web

from api import keys
from api.errors import ApiError
from api.schemas.inference import InferenceRequest
from api.schemas.parsing import readable
from broker.jobs import Band, NewJob
from config.catalogue import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """How long, how often and when a job may run and be kept; as in `NewJob`.

    What is None is the installation's default.
    """

    ttl_s: int | None = None
    max_attempts: int | None = None
    deadline_ms: int = 0
    execution_timeout_ms: int = 0
    delay_ms: int = 0


_DEFAULT_TERMS: Final = Terms()
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")


def milliseconds(seconds: float | None) -> int:
    return round((seconds or 0) * 1000)


def new_job(
    request: web.Request,
    wanted: InferenceRequest,
    raw: bytes,
    *,
    priority: str | None = None,
    metadata: dict[str, str] | None = None,
    terms: Terms = _DEFAULT_TERMS,
    within: str = "",
) -> NewJob:
    """The job for a request of its tenant, whose body is `raw`.

    `within` is where the inference request lies in the body, for error messages. Raises `ApiError`.
    """
    app = request.app
    principal = request[keys.PRINCIPAL]
    queue = app[keys.SETTINGS].queue
    spec = checked(app[keys.CATALOGUE], wanted, within)
    if wanted.logprobs_wanted and not principal.policy.allow_logprobs:
        raise ApiError(
            "parameter_not_allowed",
            "The tenant's policy does not allow logprobs.",
            param=within + "logprobs",
        )
    band = wanted.band
    if priority is not None:
        if band is not None and band != priority:
            raise ApiError(
                "invalid_request", "It contradicts the priority of the body.", param="priority"
            )
        band = Band(priority)
    if metadata is None:
        metadata = wanted.metadata
    body = wanted.to_body()
    idempotency_key = _idempotency_key(request)
    return NewJob(
        tenant=principal.tenant,
        key_id=principal.key_id,
        model=spec.name,
        endpoint=wanted.endpoint,
        band=band or principal.policy.default_band,
        cost=wanted.cost(body, spec),
        body=body,
        metadata=orjson.dumps(metadata) if metadata else b"{}",
        stream=wanted.streams,
        max_attempts=terms.max_attempts or queue.max_attempts,
        result_ttl_s=terms.ttl_s or queue.result_ttl_s,
        deadline_ms=terms.deadline_ms,
        execution_timeout_ms=terms.execution_timeout_ms,
        delay_ms=terms.delay_ms,
        request_id=request[keys.REQUEST_ID],
        idempotency_key=idempotency_key,
        fingerprint=_fingerprint(request, raw) if idempotency_key else "",
        limits=principal.policy.limits,
        key_limits=principal.key_limits,
    )


def checked(
    catalogue: Mapping[str, ModelSpec], wanted: InferenceRequest, within: str = ""
) -> ModelSpec:
    """The model of a request that it can honour. Raises `ApiError`."""
    objection = wanted.objection()
    if objection is not None:
        param = readable(within + objection.param)
        raise ApiError(objection.code, objection.message, param=param)
    spec = _model(catalogue, wanted, within)
    _check_limit(wanted, spec, within)
    return spec


def _idempotency_key(request: web.Request) -> str:
    """The caller's name for this request, or nothing. Raises `ApiError`."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return ""
    if not _IDEMPOTENCY_KEY.fullmatch(given):
        raise ApiError(
            "invalid_request",
            "It must have 1 to 255 visible ASCII characters.",
            param="Idempotency-Key",
        )
    return given


def _fingerprint(request: web.Request, raw: bytes) -> str:
    """Of what was sent, byte by byte: what becomes of it may depend on the time and on policy."""
    return blake2b(request.path.encode() + b"\0" + raw, digest_size=16).hexdigest()


def _model(catalogue: Mapping[str, ModelSpec], wanted: InferenceRequest, within: str) -> ModelSpec:
    spec = catalogue.get(wanted.model)
    if spec is None:
        raise ApiError(
            "model_not_found",
            "There is no such model; GET /v1/models lists them.",
            param=within + "model",
        )
    if spec.kind != wanted.kind:
        raise ApiError(
            "invalid_request",
            f"This model does not serve {wanted.endpoint}; it serves {', '.join(spec.endpoints)}.",
            param=within + "model",
        )
    return spec


def _check_limit(wanted: InferenceRequest, spec: ModelSpec, within: str) -> None:
    limit = wanted.token_limit
    if limit is not None and limit > spec.output_limit:
        raise ApiError(
            "invalid_request",
            f"This model generates at most {spec.output_limit} tokens.",
            param=within + wanted.limit_name,
        )
