"""`forebay demo`: the stack on this machine, shown at work, and gone again."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

import click
from rich.console import Console

from api.accounts.errors import AccountsError
from api.accounts.service import AccountsService
from api.cli.console import stdout
from api.cli.context import resolve
from api.cli.demo_scenes import Tenant, cancel_one, compete, embed, stream_one
from api.cli.demo_stack import Addresses, DemoStack
from api.cli.failures import CommandError
from api.cli.pulling import PullError, progress_bars, pull
from api.client import AsyncClient, ClientError
from broker.async_queue import AsyncRedisQueue
from broker.connections import connect_async
from broker.jobs import Band
from config import catalogue, logs
from config import settings as config_settings
from config.catalogue import ModelSpec
from config.settings import Settings

T = TypeVar("T")

#: Jobs the chat worker runs at once in the demo: few, so that a queue forms and fairness shows.
_SLOTS = 8
#: Longest time for one scene.
_SCENE_S = 240.0


@click.command()
@click.option(
    "--engine",
    type=click.Choice(["transformers", "simulated"]),
    help="simulated runs no model and says so.",
)
@click.option("--keep", is_flag=True, envvar="KEEP", help="Leave the stack running (KEEP=1).")
def demo(engine: str | None, keep: bool) -> None:
    """Start everything, show it at work on real jobs, stop everything.

    Streams an answer, lets four tenants compete, embeds sentences, cancels a running job.
    """
    settings = config_settings.load()
    chosen = engine or settings.worker.engine
    # The scenes say what happens; of this process's own log only what went wrong matters.
    logs.configure(settings.log.model_copy(update={"level": "warning"}), process="demo")
    models = _models(settings)
    stack = DemoStack(models, engine=chosen, keep=keep)
    kept = False
    try:
        kept = _until_stopped(_play(stack, models, chosen, keep=keep, console=stdout()))
    except (ClientError, AccountsError, PullError, TimeoutError) as error:
        raise CommandError(f"the demo failed: {error}") from None
    except KeyboardInterrupt:
        raise CommandError("interrupted", exit_code=130) from None
    finally:
        if not kept:
            stack.clean()


def _models(settings: Settings) -> dict[str, ModelSpec]:
    """One chat and one embedding model, the chat model with few slots."""
    known = catalogue.load(settings.models.catalogue)
    found: dict[str, ModelSpec] = {}
    for kind in ("chat", "embedding"):
        spec = next((spec for spec in known.values() if spec.kind == kind), None)
        if spec is None:
            raise CommandError(f"the catalogue has no {kind} model")
        if kind == "chat":
            spec = spec.model_copy(update={"max_batch": min(_SLOTS, spec.max_batch)})
        found[spec.name] = spec
    return found


def _until_stopped(main: Coroutine[Any, Any, bool]) -> bool:
    """Run; SIGTERM ends it like Ctrl-C, so that the stack is ended too."""

    async def run() -> bool:
        task = asyncio.ensure_future(main)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None

    return asyncio.run(run())


async def _play(
    stack: DemoStack,
    models: Mapping[str, ModelSpec],
    engine: str,
    *,
    keep: bool,
    console: Console,
) -> bool:
    """All scenes; returns whether the stack was left running."""
    began = time.monotonic()
    simulated = engine == "simulated"
    if simulated:
        console.print("Engine: simulated. No model runs; times and texts say nothing about one.")
    try:
        if not simulated:
            with progress_bars() as report:
                await pull(list(models), stack.environment, report=report)
        addresses = await _start(stack, console)
        watching = asyncio.create_task(stack.ended())
        scenes = asyncio.create_task(
            _scenes(stack, addresses, models, console, simulated=simulated)
        )
        try:
            await asyncio.wait([watching, scenes], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                await watching
            await scenes
        except Exception as error:
            # Now, while its end says what went wrong and not how it was stopped.
            if not getattr(error, "details", ""):
                click.echo(stack.tail(), err=True)
            raise
        finally:
            for task in (watching, scenes):
                task.cancel()
            await asyncio.gather(watching, scenes, return_exceptions=True)
        if keep:
            _left_running(stack, addresses, console)
            return True
    finally:
        if not keep:
            took_s = await asyncio.shield(stack.stop())
    console.print(f"\nStopped in {took_s:.1f} s. The demo took {time.monotonic() - began:.0f} s.")
    return False


async def _start(stack: DemoStack, console: Console) -> Addresses:
    began = time.monotonic()
    if console.is_terminal:
        with console.status("Starting Redis, API, workers and Flower"):
            addresses = await stack.start()
    else:
        addresses = await stack.start()
    console.print(
        f"Stack ready in {time.monotonic() - began:.1f} s: API {addresses.api},"
        f" Flower {addresses.flower}, metrics {addresses.metrics}",
        soft_wrap=True,
    )
    return addresses


async def _scenes(
    stack: DemoStack,
    addresses: Addresses,
    models: Mapping[str, ModelSpec],
    console: Console,
    *,
    simulated: bool,
) -> None:
    chat = next(spec for spec in models.values() if spec.kind == "chat")
    embedding = next(spec for spec in models.values() if spec.kind == "embedding")
    settings = resolve(stack.data_dir)
    async with AsyncClient(addresses.api, addresses.admin_key) as client:
        _title(console, f"1. One answer, streamed from {chat.name}")
        await _bounded(stream_one(client, chat.name, console))
        _title(console, f"2. 32 chats of four tenants, all at once, {chat.max_batch} slots")
        tenants = await asyncio.to_thread(_make_tenants, settings)
        await _bounded(compete(addresses.api, addresses.metrics, tenants, chat.name, console))
        _title(console, f"3. Sentences embedded by {embedding.name}")
        await _bounded(embed(client, embedding.name, console, simulated=simulated))
        _title(console, "4. A running job is cancelled and its slot is free")
        redis = connect_async(settings.redis)
        try:
            queue = AsyncRedisQueue(redis, settings.queue)
            await _bounded(cancel_one(client, queue, chat.name, chat.max_batch, console))
        finally:
            await redis.aclose()


async def _bounded(scene: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(scene, _SCENE_S)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"a scene took more than {_SCENE_S:g} s") from None


def _make_tenants(settings: Settings) -> list[Tenant]:
    """The one that hoards comes first and still waits longest: it has the lowest priority."""
    tenants = [
        Tenant("delta", weight=1, band="batch"),
        Tenant("cascade", weight=1, band="standard"),
        Tenant("borealis", weight=1, band="interactive"),
        Tenant("aurora", weight=3, band="interactive"),
    ]
    with AccountsService.from_settings(settings) as service:
        for tenant in tenants:
            service.create_tenant(tenant.name, weight=tenant.weight, default_band=Band(tenant.band))
            tenant.key = service.create_key(tenant.name, name="demo").secret
    return tenants


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _left_running(stack: DemoStack, addresses: Addresses, console: Console) -> None:
    console.print(
        "\nLeft running (KEEP):\n"
        f"  API      {addresses.api}\n"
        f"  Flower   {addresses.flower}\n"
        f"  metrics  {addresses.metrics}\n"
        f"  key      {addresses.admin_key}\n"
        f"  log      {stack.log}\n"
        f"  try      forebay submit --data-dir {stack.data_dir} --stream 'Hello'\n"
        f"  stop     kill {stack.pid}   (data in {stack.folder})",
        soft_wrap=True,
    )
