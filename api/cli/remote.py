"""Commands that speak HTTP: the client for the resolved target, its errors as one line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from api.cli.context import resolve_target
from api.cli.failures import CommandError
from api.client import AsyncClient, ClientError

T = TypeVar("T")


def remote(
    action: Callable[[AsyncClient], Awaitable[T]],
    *,
    data_dir: Path | None,
    url: str | None,
    key: str | None,
) -> T:
    """Run one action with a client. Raises `CommandError`."""
    target = resolve_target(data_dir, url=url, key=key)

    async def run() -> T:
        async with AsyncClient(target.url, target.key) as client:
            return await action(client)

    try:
        return asyncio.run(run())
    except (ClientError, TimeoutError) as error:
        raise CommandError(str(error)) from None
