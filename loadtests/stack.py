"""Parts of Forebay as a benchmark starts them: settings as environment, an account, a request."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from api.accounts.database import make_engine
from api.accounts.schema import upgrade
from api.accounts.service import AccountsService
from config.settings import Settings

#: The catalogue's chat model; with the simulated engine only its name and limits matter.
MODEL = "smollm2-135m"
#: Its embedding model.
EMBEDDINGS = "all-minilm-l6-v2"
TENANT = "bench"

#: More than any benchmark puts in; the bound is still checked for each job.
_MANY = 1_000_000


def request_body(text: str = "hi", *, max_tokens: int = 1) -> dict[str, Any]:
    """A chat request as the API hands it to the queue."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0}


def worker_env(redis_url: str, *, capacity: int, step_ms: float) -> dict[str, str]:
    """A worker with the simulated engine whose step takes `step_ms` for any batch.

    Task events are off, as they are in a stock worker.
    """
    return {
        "FOREBAY_REDIS__URL": redis_url,
        "FOREBAY_WORKER__ENGINE": "simulated",
        "FOREBAY_WORKER__TASK_EVENTS": "false",
        "FOREBAY_SIMULATED__CAPACITY": str(capacity),
        "FOREBAY_SIMULATED__STEP_MS": str(step_ms),
        "FOREBAY_SIMULATED__STEP_MS_PER_SEQUENCE": "0",
        "FOREBAY_SIMULATED__PREFILL_MS_PER_TOKEN": "0",
    }


def api_env(redis_url: str, folder: Path) -> dict[str, str]:
    """An API process with a database of its own."""
    return {
        "FOREBAY_REDIS__URL": redis_url,
        "FOREBAY_DATABASE__URL": f"sqlite:///{folder / 'accounts.db'}",
        "FOREBAY_AUTH__PEPPER": secrets.token_hex(32),
    }


def create_key(env: dict[str, str], *, max_in_flight: int | None = None) -> str:
    """Make the schema, the tenant `bench` and a key of it; the key's secret."""
    settings = Settings(
        redis={"url": env["FOREBAY_REDIS__URL"]},
        database={"url": env["FOREBAY_DATABASE__URL"]},
        auth={"pepper": env["FOREBAY_AUTH__PEPPER"]},
    )
    engine = make_engine(settings.database)
    upgrade(engine)
    engine.dispose()
    with AccountsService.from_settings(settings) as accounts:
        accounts.create_tenant(TENANT, max_queued=_MANY, max_in_flight=max_in_flight)
        return accounts.create_key(TENANT).secret
