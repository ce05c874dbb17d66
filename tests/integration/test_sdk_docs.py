"""The examples of docs/sdk.md run as they are, against a real API."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from config.settings import load
from tests.apiserver import Api, running
from tests.conftest import PATIENCE_S

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text()
#: Heading -> its example.
EXAMPLES = {
    section.partition("\n")[0]: section.partition("```python\n")[2].partition("```")[0]
    for section in DOCUMENT.split("\n## ")[1:]
}


@pytest.fixture
async def api(valkey: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    settings = load(_env_file=None, redis={"url": valkey, "timeout_s": 2})
    async with running(settings) as api:
        monkeypatch.setenv("FOREBAY_URL", api.url)
        monkeypatch.setenv("FOREBAY_API_KEY", "a")
        yield api


async def _printed(name: str) -> list[str]:
    """What an example prints; it runs in a thread, as the API has this one."""
    out = io.StringIO()

    def run() -> None:
        exec(
            compile(EXAMPLES[name], f"docs/sdk.md: {name}", "exec"),
            {"print": partial(print, file=out)},
        )

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(run)
    return out.getvalue().splitlines()


async def test_submit_and_wait(api: Api) -> None:
    (line,) = await _printed("Submit and wait")
    assert re.fullmatch(r"completed one two three \d+", line)


async def test_stream(api: Api) -> None:
    lines = await _printed("Stream, and go on after a break")
    assert lines == ["one two three", " job.completed 8", "[3, 4, 5, 6]"]


async def test_usage(api: Api) -> None:
    assert await _printed("Usage") == []
    await _printed("Submit and wait")
    (line,) = await _printed("Usage")
    assert re.fullmatch(r"\d+ smollm2-135m 1 5 3", line)


async def test_asyncio(api: Api) -> None:
    counts, *jobs = await _printed("asyncio")
    assert counts == "[1, 1, 1]"
    assert [line.split()[1] for line in jobs] == ["all-minilm-l6-v2"] * 3


async def test_cancel_and_retry(api: Api) -> None:
    status, results, refusal = await _printed("Cancel and retry")
    assert status in ("cancelled", "cancelling")
    assert "job_" in results
    assert refusal.startswith("409 ")


async def test_webhooks() -> None:
    assert await _printed("Webhooks") == ["job.completed", "204 400"]
