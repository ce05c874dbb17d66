"""Usage by hour and model: whose it is, how it is asked for, what command and client make of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from click.testing import CliRunner

from api.cli import main
from api.cli.usage import rows
from api.client import AsyncClient, Client, HourUsage
from tests.apiserver import CHAT, Api, chat, job

USED = {"completed": 1, "failed": 0, "cancelled": 0, "expired": 0, "cached_tokens": 0}
TOKENS = {"input_tokens": 5, "output_tokens": 3}


async def _get(api: Api, key: str = "a", **query: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with api.client.get("/v1/usage", params=query, headers=headers) as response:
        return response.status, await response.json()


async def _complete_one(api: Api) -> None:
    async with api.client.post("/v1/chat/completions", json=chat()) as response:
        assert response.status == 200


async def test_a_tenant_sees_its_own_and_no_others(api: Api) -> None:
    await _complete_one(api)
    status, page = await _get(api)
    assert status == 200
    (row,) = page["data"]
    assert page["since"] <= row["hour"] <= page["until"]
    assert row == {"object": "usage", "hour": row["hour"], "model": CHAT, **USED, **TOKENS}
    assert (await _get(api, model="another"))[1]["data"] == []
    assert (await _get(api, model=CHAT, hours="168"))[1]["data"] == [row]
    assert (await _get(api, tenant="ten_a"))[1]["data"] == [row]
    assert (await _get(api, "b"))[1]["data"] == []


async def test_another_tenant_is_named_by_operators_alone(api: Api) -> None:
    await _complete_one(api)
    for tenant in ("ten_a", "ten_nobody"):
        status, body = await _get(api, "b", tenant=tenant)
        error = body["error"]
        assert (status, error["code"], error["param"]) == (403, "insufficient_scope", "tenant")
    api.accounts.change("b", scopes=frozenset({"jobs", "admin"}))
    assert len((await _get(api, "b", tenant="ten_a"))[1]["data"]) == 1
    assert (await _get(api, "b", tenant="ten_nobody"))[1]["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"hours": "0"}, "hours"),
        ({"hours": "169"}, "hours"),
        ({"hours": "a day"}, "hours"),
        ({"model": ""}, "model"),
        ({"tenant": "x" * 65}, "tenant"),
        ({"since": "1"}, "since"),
    ],
)
async def test_what_makes_no_sense_is_named(api: Api, query: dict[str, str], param: str) -> None:
    status, body = await _get(api, **query)
    assert (status, body["error"]["param"]) == (400, param)


async def test_ends_of_all_kinds_are_told_apart(api: Api) -> None:
    for prompt in ("a", "fail worker_lost"):
        async with api.client.post("/v1/jobs", json=job(prompt)) as response:
            made = (await response.json())["id"]
        await api.client.get(f"/v1/jobs/{made}", params={"wait": "9"})
    async with api.client.post("/v1/jobs", json=job("x", delay=600)) as response:
        made = (await response.json())["id"]
    await api.client.post(f"/v1/jobs/{made}/cancel")
    async with AsyncClient(api.url, "a") as client:
        found = await client.usage(hours=2)
    assert [sum(getattr(each, end) for each in found) for end in USED] == [1, 1, 1, 0, 0]

    def look() -> list[HourUsage]:
        with Client(api.url, "a") as sync:
            return sync.usage(hours=2, model=CHAT)

    assert await asyncio.to_thread(look) == found


async def test_the_command_prints_hours_and_sums(api: Api) -> None:
    await _complete_one(api)

    async def forebay(*args: str) -> tuple[int, str]:
        command = ("usage", "--api", api.url, "--key", "a", *args)
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
        return result.exit_code, result.output

    code, said = await forebay("--json", "--hours", "3")
    assert (code, json.loads(said)) == (0, (await _get(api))[1]["data"])
    code, said = await forebay()
    header, hour, total = said.splitlines()
    assert header.split()[:3] == ["Hour", "Model", "Completed"]
    assert hour.split()[2:] == [CHAT, "1", "0", "0", "0", "5", "0", "3"]
    assert total.split() == ["all", CHAT, "1", "0", "0", "0", "5", "0", "3"]
    assert await forebay("--model", "another") == (0, "no job has ended\n")
    code, said = await forebay("--tenant", "ten_b")
    assert code != 0
    assert "insufficient_scope" in said


def test_sums_are_of_each_model() -> None:
    hours = [
        HourUsage(
            hour=hour,
            model=model,
            completed=1,
            failed=0,
            cancelled=0,
            expired=0,
            input_tokens=tokens,
            cached_tokens=1,
            output_tokens=2,
        )
        for hour, model, tokens in ((0, "b", 5), (3_600, "a", 7), (3_600, "b", 10))
    ]
    assert rows(hours)[3:] == [
        ("all", "a", 1, 0, 0, 0, 7, 1, 2),
        ("all", "b", 2, 0, 0, 0, 15, 2, 4),
    ]
