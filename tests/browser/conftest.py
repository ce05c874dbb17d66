"""The console in a headless Chromium, against the API with a worker and a webhook courier.

All tests share one browser and one event loop; each has an empty Redis, an API and a page of its
own, and none may leave an error or a warning in the browser's log.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api.accounts.webhook_service import open_webhooks
from broker.connections import connect_async
from broker.webhooks import signing
from config.settings import Settings, load
from tests.apiserver import make_database, running
from tests.browser.driving import Console
from tests.conftest import PATIENCE_S, missing
from tests.webhooklab import Lab, lab, receiving

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Any]:
    program = shutil.which("chromium")
    if program is None:
        missing("chromium")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(executable_path=program, args=ARGS)
        yield made
        await made.close()


@pytest.fixture
def settings(valkey: str, tmp_path: Path) -> Settings:
    return load(
        _env_file=None,
        redis={"url": valkey},
        database={"url": f"sqlite:///{tmp_path / 'accounts.db'}"},
        auth={"pepper": "pepper-of-the-tests"},
        webhooks={"allow_loopback": True, "timeout_s": PATIENCE_S},
    )


@pytest_asyncio.fixture(loop_scope="module")
async def console(browser: Any, settings: Settings) -> AsyncIterator[Console]:
    make_database(settings)
    url = settings.redis.url.get_secret_value()
    async with (
        receiving() as receiver,
        connect_async(settings.redis) as client,
        open_webhooks(settings, client=client) as service,
        running(settings, webhooks=service) as api,
        lab(url) as here,
    ):
        context = await browser.new_context(
            viewport={"width": 1280, "height": 800}, reduced_motion="reduce"
        )
        context.set_default_timeout(15_000)
        made = Console(await context.new_page(), api, receiver)
        _listen(made)
        sending = _couriers(here, settings)
        try:
            yield made
        finally:
            await context.close()
            await _ended(sending)
    assert made.errors == []


def _listen(console: Console) -> None:
    page = console.page
    page.on("pageerror", lambda error: console.errors.append(str(error)))
    page.on("request", lambda request: console.requests.append(request))
    page.on(
        "console",
        lambda message: (
            console.errors.append(message.text) if message.type in ("error", "warning") else None
        ),
    )


def _couriers(here: Lab, settings: Settings) -> set[asyncio.Task[Any]]:
    """A courier whose tasks run at once."""
    here.courier._clock = time.time
    here.courier._key = signing.installation_key(settings)
    sending: set[asyncio.Task[Any]] = set()

    async def dispatch(delivery_id: str, attempt: int) -> None:
        sending.add(asyncio.create_task(here.courier.deliver(delivery_id, attempt)))

    here.courier._dispatch = dispatch
    sending.add(asyncio.create_task(here.courier.run()))
    return sending


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    # Again and again: redis-py uses `asyncio.wait_for`, which in Python 3.11 can swallow a cancel.
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.1)
