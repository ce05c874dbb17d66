"""From a checked request to a job: which model, how urgent, how much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import orjson
from aiohttp import hdrs, web

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
    no_store: bool = False


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
    idempotency_key = idempotency_key_of(request)
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
        no_store=terms.no_store or _no_store(request),
        request_id=request[keys.REQUEST_ID],
        idempotency_key=idempotency_key,
        fingerprint=fingerprint_of(request, raw) if idempotency_key else "",
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
    misfit = wanted.misfit(spec)
    if misfit is not None:
        raise ApiError(misfit.code, misfit.message, param=within + misfit.param)
    return spec


def _no_store(request: web.Request) -> bool:
    wishes = request.headers.get(hdrs.CACHE_CONTROL)
    return wishes is not None and "no-store" in wishes.lower()


def idempotency_key_of(request: web.Request) -> str:
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


def fingerprint_of(request: web.Request, raw: bytes) -> str:
    """Of what was sent, byte by byte: what becomes of it may depend on the time and on policy."""
    return blake2b(request.path.encode() + b"\0" + raw, digest_size=16).hexdigest()


def _model(catalogue: Mapping[str, ModelSpec], wanted: InferenceRequest, within: str) -> ModelSpec:
    if not wanted.model:
        return _only(catalogue, wanted, within)
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


def _only(catalogue: Mapping[str, ModelSpec], wanted: InferenceRequest, within: str) -> ModelSpec:
    """The model that is meant when none is named."""
    fitting = [spec for spec in catalogue.values() if spec.kind == wanted.kind]
    if not fitting:
        raise ApiError(
            "model_not_found",
            f"No model serves {wanted.endpoint}: the operator adds one of kind {wanted.kind} to"
            " the catalogue (FOREBAY_MODELS__CATALOGUE).",
            param=within + "model",
        )
    if len(fitting) > 1:
        names = ", ".join(spec.name for spec in fitting)
        raise ApiError("invalid_request", f"Name one of {names}.", param=within + "model")
    return fitting[0]
