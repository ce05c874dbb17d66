"""Connections of the API: what they keep between two requests."""

from __future__ import annotations

import gc

from aiohttp import web

from tests.apiserver import Api


def _answers() -> list[web.Response]:
    # By type: asking some objects of torch for their class makes them warn.
    return [each for each in gc.get_objects() if type(each) is web.Response]


async def test_an_idle_connection_does_not_keep_its_last_answer(api: Api) -> None:
    # Referenced, so that an id is not given twice.
    earlier = _answers()
    known = {id(each) for each in earlier}
    response = await api.client.get("/v1/models")
    assert (await response.json())["data"]
    kept = [each for each in _answers() if id(each) not in known]
    # aiohttp holds the object until the next one; its body may be megabytes.
    assert kept
    assert [each for each in kept if each.body is not None] == []
