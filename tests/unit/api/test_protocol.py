"""Connections of the API: what they keep between two requests."""

from __future__ import annotations

import gc

from aiohttp import web

from tests.apiserver import Api


async def test_an_idle_connection_does_not_keep_its_last_answer(api: Api) -> None:
    response = await api.client.get("/v1/models")
    assert (await response.json())["data"]
    kept = [each for each in gc.get_objects() if isinstance(each, web.Response)]
    # aiohttp holds the object until the next one; its body may be megabytes.
    assert kept
    assert all(each.body is None for each in kept)
