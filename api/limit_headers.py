"""Rate limits as response headers: OpenAI's names, and the IETF's draft.

https://platform.openai.com/docs/guides/rate-limits and
https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (structured fields).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from broker.limits import LimitState

_WINDOW_S = 60


def limit_headers(states: Iterable[LimitState]) -> dict[str, str]:
    """Headers for the limits a call was under; none without limits.

    OpenAI's know no scopes: of a tenant's and a key's limit they tell the one with less left.
    """
    states = tuple(states)
    if not states:
        return {}
    headers: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        of_kind = [state for state in states if state.kind == kind]
        if of_kind:
            tightest = min(of_kind, key=lambda state: state.remaining)
            headers[f"x-ratelimit-limit-{kind}"] = str(tightest.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(tightest.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = _duration(tightest.reset_ms)
    headers["RateLimit-Policy"] = ", ".join(
        f'"{_name(state)}";q={state.limit};w={_WINDOW_S}' + _unit(state) for state in states
    )
    headers["RateLimit"] = ", ".join(
        f'"{_name(state)}";r={state.remaining};t={ceil(state.reset_ms / 1000)}' for state in states
    )
    return headers


def _name(state: LimitState) -> str:
    return f"{state.scope}-{state.kind}"


def _unit(state: LimitState) -> str:
    # Requests are the unit when none is named.
    return ';qu="tokens"' if state.kind == "tokens" else ""


def _duration(ms: int) -> str:
    """As OpenAI writes it: `20ms`, `1.5s`, `6m0s`."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{ceil(rest_ms / 1000)}s" if minutes else f"{rest_ms / 1000:g}s"
