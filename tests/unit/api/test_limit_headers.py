"""Rate limits as response headers."""

from __future__ import annotations

import pytest

from api.limit_headers import limit_headers
from broker.limits import LimitState


def test_without_limits_there_are_none() -> None:
    assert limit_headers(()) == {}


def test_openais_tell_the_tighter_limit_and_the_drafts_tell_all() -> None:
    states = (
        LimitState(scope="tenant", kind="requests", limit=60, remaining=10, reset_ms=50_000),
        LimitState(scope="tenant", kind="tokens", limit=9000, remaining=8000, reset_ms=6_667),
        LimitState(scope="key", kind="requests", limit=6, remaining=5, reset_ms=10_000),
    )
    assert limit_headers(states) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10s",
        "x-ratelimit-limit-tokens": "9000",
        "x-ratelimit-remaining-tokens": "8000",
        "x-ratelimit-reset-tokens": "6.667s",
        "RateLimit-Policy": '"tenant-requests";q=60;w=60, "tenant-tokens";q=9000;w=60;qu="tokens",'
        ' "key-requests";q=6;w=60',
        "RateLimit": '"tenant-requests";r=10;t=50, "tenant-tokens";r=8000;t=7,'
        ' "key-requests";r=5;t=10',
    }


@pytest.mark.parametrize(
    ("reset_ms", "shown"), [(0, "0ms"), (20, "20ms"), (1500, "1.5s"), (360_000, "6m0s")]
)
def test_durations_are_written_as_openai_does(reset_ms: int, shown: str) -> None:
    state = LimitState(scope="key", kind="tokens", limit=1, remaining=0, reset_ms=reset_ms)
    assert limit_headers([state])["x-ratelimit-reset-tokens"] == shown
