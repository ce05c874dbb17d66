"""The main job from outside: accounts, isolation, delivery, consoles, ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

CHAT = "smollm2-135m"


def _job(text: str, *, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "endpoint": "/v1/chat/completions",
        "body": {
            "model": CHAT,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
        },
    } | more


def _session(key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"})


async def test_a_job_is_accepted_waited_for_and_listed(stack: Any) -> None:
    async with _session(stack.admin_key) as session:
        async with session.post(f"{stack.api}/v1/jobs", json=_job("hello")) as response:
            assert response.status == 202
            job = await response.json()
            assert response.headers["Location"].endswith(job["id"])
        async with session.get(f"{stack.api}/v1/jobs/{job['id']}?wait=20") as response:
            done = await response.json()
        assert done["status"] == "completed"
        assert done["output"]["system_fingerprint"] == "simulated"
        assert done["usage"]["output_tokens"] == 8
        async with session.get(f"{stack.api}/v1/jobs?limit=5&status=completed") as response:
            assert job["id"] in [entry["id"] for entry in (await response.json())["data"]]
    shown = stack.json("jobs", "get", job["id"])
    assert shown["status"] == "completed"


async def test_events_are_numbered_without_gaps_and_resume(stack: Any) -> None:
    payload = _job("stream me", max_tokens=20)
    payload["body"]["stream"] = True
    async with _session(stack.admin_key) as session:
        async with session.post(f"{stack.api}/v1/jobs", json=payload) as response:
            url = (await response.json())["urls"]["events"]
        url = url if url.startswith("http") else stack.api + url
        async with session.get(url) as response:
            text = await response.text()
        numbers = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert "event: job.completed" in text
        async with session.get(url, headers={"Last-Event-ID": str(numbers[-3])}) as response:
            rest = await response.text()
        resumed = [int(line[4:]) for line in rest.splitlines() if line.startswith("id: ")]
        assert resumed == numbers[-2:]


async def test_the_same_embedding_is_computed_once(stack: Any) -> None:
    body = {"model": "all-minilm-l6-v2", "input": [f"twice {time.time_ns()}", "and this"]}
    answers = []
    async with _session(stack.admin_key) as session:
        for _ in range(2):
            async with session.post(f"{stack.api}/v1/embeddings", json=body) as response:
                answers.append(await response.json())
        async with session.get(stack.metrics) as response:
            counted = (await response.text()).splitlines()
    assert answers[0]["data"] == answers[1]["data"]
    kept = [line for line in counted if line.startswith("forebay_workers_answers_total")]
    assert any('source="kept"' in line for line in kept), kept


async def test_another_tenant_sees_nothing(stack: Any) -> None:
    name = f"other-{time.time_ns()}"
    stack.json("tenants", "create", name)
    key = stack.json("keys", "create", name)["key"]
    async with (
        _session(stack.admin_key) as session,
        session.post(f"{stack.api}/v1/jobs", json=_job("mine")) as response,
    ):
        mine = (await response.json())["id"]
    async with _session(key) as session:
        async with asyncio.timeout(5):
            while (await session.get(f"{stack.api}/v1/models")).status == 401:
                await asyncio.sleep(0.05)
        bodies = []
        for job_id in (mine, "job_00000000000000000000000000"):
            for method, path in [("GET", ""), ("POST", "/cancel"), ("GET", "/events")]:
                async with session.request(
                    method, f"{stack.api}/v1/jobs/{job_id}{path}"
                ) as response:
                    assert response.status == 404
                    error = (await response.json())["error"]
                    error.pop("request_id")
                    bodies.append(json.dumps(error, sort_keys=True).replace(job_id, "ID"))
        assert len(set(bodies)) == 1
        async with session.get(f"{stack.api}/v1/jobs") as response:
            assert (await response.json())["data"] == []


async def test_a_revoked_key_is_out_within_5_s(stack: Any) -> None:
    name = f"leaver-{time.time_ns()}"
    stack.json("tenants", "create", name)
    made = stack.json("keys", "create", name)
    async with _session(made["key"]) as session:
        async with asyncio.timeout(5):
            while (await session.get(f"{stack.api}/v1/models")).status != 200:
                await asyncio.sleep(0.05)
        stack.json("keys", "revoke", made["id"])
        async with asyncio.timeout(5):
            while (await session.get(f"{stack.api}/v1/models")).status != 401:
                await asyncio.sleep(0.05)


async def test_consoles_and_metrics(stack: Any) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{stack.api}/readyz") as response:
            assert response.status == 200
        async with session.get(stack.metrics) as response:
            text = await response.text()
        for name in ("forebay_api_", "forebay_workers_", "forebay_broker_queue_depth"):
            assert name in text, name
        async with session.get(f"{stack.flower}/api/queues/length") as response:
            queues = {row["name"] for row in (await response.json())["active_queues"]}
        assert CHAT in queues
    workers = stack.json("workers")
    assert {worker["engine"] for worker in workers} == {"simulated"}
    assert {worker["state"] for worker in workers} == {"ready"}


def test_a_second_up_on_the_same_folder_is_refused(stack: Any) -> None:
    again = stack.run("up", check=False)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1
    assert str(stack.process.pid) in again.stderr


async def test_redis_restarts_while_jobs_run(start: Callable[..., Any], tmp_path: Path) -> None:
    """Accepted jobs survive (AOF); meanwhile the front answers 503 and nothing is half made."""
    with start(
        tmp_path / "data",
        "--engine",
        "simulated",
        FOREBAY_QUEUE__LEASE_TTL_S="3",
        FOREBAY_QUEUE__RENEW_EVERY_S="1",
    ) as stack:
        (valkey,) = [
            child
            for child in psutil.Process(stack.process.pid).children(recursive=True)
            if "valkey" in child.name()
        ]
        async with _session(stack.admin_key) as session:
            accepted = []
            for number in range(30):
                payload = _job(f"n {number}", max_tokens=60)
                async with session.post(f"{stack.api}/v1/jobs", json=payload) as response:
                    assert response.status == 202
                    accepted.append((await response.json())["id"])
            # `everysec` may lose the last second of writes: this test is about the restart.
            await asyncio.sleep(1.2)
            os.kill(valkey.pid, signal.SIGKILL)
            refused = None
            async with asyncio.timeout(20):
                while refused is None:
                    async with session.post(f"{stack.api}/v1/jobs", json=_job("away")) as response:
                        if response.status == 503:
                            refused = await response.json()
                            assert int(response.headers["Retry-After"]) >= 1
                        elif response.status == 202:
                            accepted.append((await response.json())["id"])
            assert refused["error"]["type"] == "server_error"
            async with asyncio.timeout(60):
                for job_id in accepted:
                    while True:
                        async with session.get(f"{stack.api}/v1/jobs/{job_id}?wait=5") as response:
                            job = await response.json() if response.status == 200 else {}
                        if job.get("status") == "completed":
                            break
                        assert job.get("status") in (None, "queued", "in_progress"), job
                        await asyncio.sleep(0.2)
            # Nothing of the refused submissions is there.
            async with session.get(f"{stack.api}/v1/jobs?limit=100") as response:
                listed = {job["id"] for job in (await response.json())["data"]}
            assert listed == set(accepted)


async def test_a_killed_worker_costs_no_job(start: Callable[..., Any], tmp_path: Path) -> None:
    """kill -9 in the middle of 50 jobs: each ends once, within lease TTL + 2 s of it."""
    ttl = 3.0
    with start(
        tmp_path / "data",
        "--engine",
        "simulated",
        FOREBAY_QUEUE__LEASE_TTL_S=str(ttl),
        FOREBAY_QUEUE__RENEW_EVERY_S="1",
        FOREBAY_SIMULATED__STEP_MS="10",
        FOREBAY_SIMULATED__STEP_MS_PER_SEQUENCE="0",
        FOREBAY_SIMULATED__CAPACITY="8",
    ) as stack:
        worker = next(w for w in stack.json("workers") if w["queue"] == CHAT)
        # A second worker takes over; it needs no restart to be waited for.
        second = subprocess.Popen(
            [sys.executable, "-m", "workers", "--model", CHAT, "--name", "b"],
            env=psutil.Process(worker["pid"]).environ(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(30):
                while sum(w["queue"] == CHAT for w in stack.json("workers")) < 2:
                    await asyncio.sleep(0.1)
            async with _session(stack.admin_key) as session:
                ids = []
                for number in range(50):
                    payload = _job(f"n {number}", max_tokens=30)
                    async with session.post(f"{stack.api}/v1/jobs", json=payload) as response:
                        ids.append((await response.json())["id"])
                # Once the first is done, both workers are in the middle of others.
                async with session.get(f"{stack.api}/v1/jobs/{ids[0]}?wait=30") as response:
                    assert (await response.json())["status"] == "completed"
                os.kill(worker["pid"], signal.SIGKILL)
                killed = time.time()
                jobs = []
                for job_id in ids:
                    async with session.get(f"{stack.api}/v1/jobs/{job_id}?wait=30") as response:
                        jobs.append(await response.json())
                assert {job["status"] for job in jobs} == {"completed"}
                assert max(job["attempt"] for job in jobs) == 2
                assert max(job["completed_at"] for job in jobs) - killed <= ttl + 2
                for job_id in ids:
                    async with session.get(f"{stack.api}/v1/jobs/{job_id}/events") as response:
                        assert (await response.text()).count("event: job.completed") == 1
        finally:
            second.terminate()
            second.wait(15)
