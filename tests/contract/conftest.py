"""The queue in all its implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from tests.contract.harness import MODEL, Harness, opened, settings
from tests.contract.invariants import check

KINDS = ("memory", "memory-async", "valkey", "valkey-async", "redis7")


@pytest.fixture(params=KINDS)
def make_harness(request: pytest.FixtureRequest) -> Iterator[Callable[..., Harness]]:
    """Opens an empty queue under given queue settings; at the end the invariants must hold."""
    kind: str = request.param
    url: str | None = None
    if not kind.startswith("memory"):
        url = request.getfixturevalue(f"{kind.removesuffix('-async')}_url")
        with redis.Redis.from_url(str(url)) as client:
            client.flushall()
    with ExitStack() as stack:
        made: list[Harness] = []

        def make(**fields: Any) -> Harness:
            made.append(stack.enter_context(opened(kind, url, settings(**fields))))
            return made[-1]

        yield make
        for harness in made:
            if harness.client is not None:
                check(harness.client, MODEL)


@pytest.fixture
def harness(make_harness: Callable[..., Harness]) -> Harness:
    return make_harness()
