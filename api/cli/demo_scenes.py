"""What a demo shows, scene by scene; each raises `CommandError` when it can't show it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.table import Table

from api.cli.console import duration
from api.cli.demo_figures import Run, batch_steps, nearest, tenant_row
from api.cli.failures import CommandError
from api.client import ApiError, AsyncClient, JobEvent, RemoteJob
from broker.async_queue import AsyncRedisQueue

_CHAT = "/v1/chat/completions"
_PROMPTS = (
    "Name three rivers and say where they end.",
    "Explain in simple words why the sky is blue.",
    "Give me a short recipe for lentil soup.",
    "What does a water turbine do?",
    "Write two lines about autumn.",
    "How do I keep bread fresh?",
    "List four uses of a lever.",
    "Why do cats purr?",
)
_ANSWER_TOKENS = 32
#: Sentences in pairs that mean nearly the same.
_SENTENCES = (
    "The cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "The bank raised interest rates.",
    "Loans have become expensive.",
    "Snow fell on the mountains.",
    "A storm covered the peaks in white.",
)


@dataclass
class Tenant:
    """One of the four, with its jobs."""

    name: str
    weight: float
    band: str
    key: str = ""
    runs: list[Run] = field(default_factory=list)


def chat_body(model: str, prompt: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }


async def stream_one(client: AsyncClient, model: str, console: Console) -> None:
    """One answer, token by token."""
    prompt = "In one or two sentences: why does a dam have a forebay?"
    console.print(f"> {prompt}")
    began = time.monotonic()
    job = await client.submit(_CHAT, chat_body(model, prompt, 48))
    run = Run("", began)
    async for event in client.events(job.id):
        _note(run, event)
        if event.type == "job.delta":
            console.file.write(event.text)
            console.file.flush()
    console.print()
    job = _completed(await client.get(job.id))
    if run.first_text is None or run.ended is None:
        raise CommandError("the answer came without a single piece of text")
    tokens = int(job.usage["output_tokens"])
    speed = (tokens - 1) / max(run.ended - run.first_text, 1e-6)
    console.print(
        f"  first token after {duration((run.first_text - began) * 1000)},"
        f" {tokens} tokens, {speed:.1f} tokens/s"
    )


async def compete(
    url: str, metrics: str, tenants: Sequence[Tenant], model: str, console: Console
) -> None:
    """Eight chats of every tenant at once, under a live view; then the table."""
    before = await _batch_steps(metrics, model)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(url, tenant.key)) for tenant in tenants
        ]
        for client in clients:
            await _until_known(client)
        began = time.monotonic()
        jobs = [
            asyncio.create_task(_one(client, tenant, model, prompt))
            for prompt in _PROMPTS
            for client, tenant in zip(clients, tenants, strict=True)
        ]
        try:
            await _watch(jobs, tenants, began, console)
        finally:
            for task in jobs:
                task.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
    took_s = time.monotonic() - began
    after = await _batch_steps(metrics, model)
    everyone = [run for tenant in tenants for run in tenant.runs]
    tokens = sum(run.output_tokens for run in everyone)
    console.print()
    console.print(_summary(tenants, everyone))
    steps = after[1] - before[1]
    if steps <= 0:
        raise CommandError("the worker's metrics show no engine step")
    console.print(
        "  Wait: until a slot was free. TTFT: from sending to the first token.\n"
        "  Batch: jobs running together, averaged over the tenant's jobs.\n"
        f"  {len(everyone)} chats, {tokens} tokens in {took_s:.1f} s ({tokens / took_s:.1f}/s)."
        f" The worker counted {steps:.0f} steps\n"
        f"  of {(after[0] - before[0]) / steps:.1f} requests on average."
    )


async def embed(client: AsyncClient, model: str, console: Console, *, simulated: bool) -> None:
    """Every sentence and the one nearest to it."""
    vectors = await client.embed(model, list(_SENTENCES))
    found = nearest(vectors)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("Sentence", "Nearest", "Cosine"):
        table.add_column(name, justify="right" if name == "Cosine" else "left")
    for index, (best, similarity) in found.items():
        table.add_row(_SENTENCES[index], _SENTENCES[best], f"{similarity:.2f}")
    console.print(table)
    if simulated:
        console.print(f"  {len(vectors[0])} numbers each; simulated vectors carry no meaning")
        return
    strangers = [index for index, (best, _) in found.items() if best != index ^ 1]
    if strangers:
        raise CommandError("an embedding is nearer to an unrelated sentence than to its pair")
    console.print(f"  {len(vectors[0])} numbers each; every sentence is nearest to its pair")


async def cancel_one(
    client: AsyncClient, queue: AsyncRedisQueue, model: str, slots: int, console: Console
) -> None:
    """All slots taken, one job waiting: cancelling a running job lets the waiting one start."""
    story = chat_body(model, "Tell a very long story about a river, with many chapters.", 900)
    jobs = [await client.submit(_CHAT, story) for _ in range(slots)]
    try:
        for job in jobs:
            await _until(client, job.id, "job.delta")
        waiting = await client.submit(_CHAT, chat_body(model, "Say hello.", 4))
        before = await queue.stats(model)
        if (before.in_flight, before.depth) != (slots, 1):
            raise CommandError(
                f"expected {slots} jobs running and 1 waiting, not {before.in_flight}"
                f" and {before.depth}"
            )
        began = time.monotonic()
        starting = asyncio.create_task(_until(client, waiting.id, "job.in_progress"))
        await client.cancel(jobs[0].id)
        cancelled = await client.wait(jobs[0].id, timeout_s=30)
        stopped_ms = (time.monotonic() - began) * 1000
        await starting
        started_ms = (time.monotonic() - began) * 1000
        if cancelled.status != "cancelled":
            raise CommandError(f"the cancelled job is {cancelled.status}")
        others = [(await client.get(job.id)).status for job in jobs[1:]]
        if set(others) - {"in_progress"}:
            raise CommandError("another job ended meanwhile, so nothing is shown by this")
        await client.wait(waiting.id, timeout_s=30)
        after = await queue.stats(model)
        console.print(
            f"  Before: {before.in_flight} of {slots} slots taken, {before.depth} job waiting."
            f" One is cancelled after {cancelled.usage.get('output_tokens', 0)} tokens.\n"
            f"  It stopped within {duration(stopped_ms)}, the waiting job started in its slot"
            f" within {duration(started_ms)}.\n"
            f"  When that one is done: {after.in_flight} of {slots} slots taken,"
            f" {after.depth} waiting."
        )
    finally:
        for job in jobs:
            await client.cancel(job.id)


async def _one(client: AsyncClient, tenant: Tenant, model: str, prompt: str) -> None:
    run = Run(tenant.name, time.monotonic())
    tenant.runs.append(run)
    job = await client.submit(_CHAT, chat_body(model, prompt, _ANSWER_TOKENS), priority=tenant.band)
    async for event in client.events(job.id):
        _note(run, event)
    job = _completed(await client.get(job.id))
    run.queue_ms = float(job.usage["queue_ms"])
    run.output_tokens = int(job.usage["output_tokens"])


def _note(run: Run, event: JobEvent) -> None:
    """Keep when it happened."""
    now = time.monotonic()
    if event.type == "job.in_progress":
        run.started, run.status = now, "running"
    elif event.type == "job.delta":
        run.first_text = run.first_text or now
    elif event.type == "job.requeued":
        run.started = run.first_text = None
        run.status = "queued"
    elif event.is_terminal:
        run.ended, run.status = now, "done"


async def _watch(
    jobs: Sequence[asyncio.Task[None]], tenants: Sequence[Tenant], began: float, console: Console
) -> None:
    """Show how far everyone is until all are done; the first failure ends it."""
    live = Live(_progress(tenants), console=console, refresh_per_second=10, transient=True)
    waiting = set(jobs)
    said, last = 0.0, ""
    if console.is_terminal:
        live.start()
    try:
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            if console.is_terminal:
                live.update(_progress(tenants))
            elif (line := _line(tenants)) != last and (time.monotonic() - said >= 1 or not waiting):
                said, last = time.monotonic(), line
                console.print(f"  {said - began:4.1f} s  {line}", soft_wrap=True)
    finally:
        if console.is_terminal:
            live.stop()


def _progress(tenants: Sequence[Tenant]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("Tenant", "Weight", "Priority", "Progress"):
        table.add_column(name)
    for tenant in tenants:
        marks = {"queued": "·", "running": "▶", "done": "█"}
        states = sorted(
            (run.status for run in tenant.runs), key=["done", "running", "queued"].index
        )
        bar = " ".join(marks[state] for state in states)
        table.add_row(tenant.name, f"{tenant.weight:g}", tenant.band, bar)
    return table


def _line(tenants: Sequence[Tenant]) -> str:
    parts = []
    for tenant in tenants:
        states = [run.status for run in tenant.runs]
        parts.append(f"{tenant.name} {states.count('done')} done {states.count('running')} running")
    return ", ".join(parts)


def _summary(tenants: Sequence[Tenant], everyone: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Tenant")
    table.add_column("Weight", justify="right")
    table.add_column("Priority", no_wrap=True)
    for name in ("Jobs", "Wait p50", "Wait p95", "TTFT p50", "Tok/s", "Batch"):
        table.add_column(name, justify="right")
    for tenant in tenants:
        name, *figures = tenant_row(tenant.name, tenant.runs, everyone)
        table.add_row(name, f"{tenant.weight:g}", tenant.band, *figures)
    return table


async def _until(client: AsyncClient, job_id: str, kind: str) -> None:
    async for event in client.events(job_id):
        if event.type == kind:
            return
    raise CommandError(f"{job_id} ended before {kind}")


async def _until_known(client: AsyncClient, timeout_s: float = 10.0) -> None:
    """A new key works as soon as the API heard of it."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await client.models()
        except ApiError as error:
            if error.status != 401 or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)
        else:
            return


def _completed(job: RemoteJob) -> RemoteJob:
    if job.status != "completed":
        code = (job.error or {}).get("code", "")
        raise CommandError(f"{job.id} {job.status} {code}")
    return job


async def _batch_steps(url: str, model: str) -> tuple[float, float]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return batch_steps(await response.text(), model)
