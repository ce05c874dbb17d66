"""`forebay up`: the whole stack on this machine, supervised, until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import click

from api.accounts.errors import AccountsError
from api.cli.accounts_setup import prepare_accounts
from api.cli.context import data_dir_option
from api.cli.datadir import DataDir, DataDirBusyError, RunFile
from api.cli.failures import FAILED, MISUSED, CommandError
from api.cli.merged_log import MergedLog
from api.cli.plan import Options, Plan, make_plan
from api.cli.ports import PortBusyError, claim_port
from api.cli.pulling import PullError
from api.cli.stack import Stack
from api.cli.supervisor import StartFailedError
from api.cli.valkey import Valkey, ValkeyError
from broker.errors import BrokerError
from config import catalogue, logs
from config import settings as config_settings
from config.settings import Settings

#: What can go wrong while the stack starts; each message is one line.
_START_ERRORS = (
    StartFailedError,
    ValkeyError,
    PullError,
    AccountsError,
    BrokerError,
    OSError,
)
#: Signals this close together are one request: the kernel sends the death signal of a parent once
#: for each of its threads, and a terminal that closes sends more than one kind.
_ONE_REQUEST_S = 0.5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@click.command()
@data_dir_option
@click.option("--api-port", type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--flower-port", type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), help="0 takes a free port (the default)."
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "simulated"]),
    help="simulated runs no model and says so everywhere.",
)
@click.option("--models", default="", help="Comma-separated names; all of the catalogue if absent.")
@click.option("--no-flower", is_flag=True, help="Without the operations console.")
@click.option("--no-webhooks", is_flag=True, help="Without the worker that sends webhooks.")
def up(
    data_dir: Path | None,
    api_port: int | None,
    flower_port: int | None,
    metrics_port: int | None,
    engine: str | None,
    models: str,
    no_flower: bool,
    no_webhooks: bool,
) -> None:
    """Start Redis, API, workers and Flower, and keep them running until Ctrl-C or SIGTERM.

    Prints one line of JSON to stdout when everything is ready; logs go to stderr.
    """
    options = Options(
        data_dir=data_dir,
        api_port=api_port,
        flower_port=flower_port,
        metrics_port=metrics_port,
        engine=engine,
        models=tuple(name.strip() for name in models.split(",") if name.strip()),
        flower=not no_flower,
        webhooks=not no_webhooks,
    )
    settings = config_settings.load()
    home = DataDir(options.data_dir or settings.data_dir)
    try:
        home.create()
        home.lock()
        plan, valkey = _plan(settings, options, home)
    except (DataDirBusyError, PortBusyError) as error:
        raise CommandError(str(error), exit_code=MISUSED) from None
    except OSError as error:
        raise CommandError(f"{home.root}: {error.strerror}", exit_code=MISUSED) from None
    # Read back: what the children are told is what this process uses.
    os.environ.update(plan.settings)
    settings = config_settings.load()
    log = MergedLog()
    _log_into(log, settings)
    try:
        status = asyncio.run(_run(plan, settings, home, valkey, log))
    finally:
        log.close()
    sys.exit(status)


def _log_into(log: MergedLog, settings: Settings) -> None:
    """This process's own lines go where its children's go."""
    logs.configure(settings.log, process="up")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(log.stream("up"))


def _plan(settings: Settings, options: Options, home: DataDir) -> tuple[Plan, Valkey | None]:
    known = home.secrets()
    valkey = None
    redis_url = settings.redis.url.get_secret_value()
    if "url" not in settings.redis.model_fields_set:
        valkey = Valkey(home.valkey, port=claim_port("127.0.0.1", 0), password=known.redis_password)
        redis_url = valkey.url
    plan = make_plan(
        settings,
        catalogue.load(settings.models.catalogue),
        options,
        home=home,
        redis_url=redis_url,
        pepper=settings.auth.pepper.get_secret_value() or known.pepper,
        readable_logs=sys.stderr.isatty(),
    )
    return plan, valkey


async def _run(
    plan: Plan, settings: Settings, home: DataDir, valkey: Valkey | None, log: MergedLog
) -> int:
    """The life of the stack; returns the exit status."""
    stages: dict[str, str] = {}

    def report(model: str, stage: str, _fraction: float) -> None:
        if stages.get(model) != stage:
            stages[model] = stage
            log.say("models", f"{model}: {stage}")

    stack = Stack(
        plan,
        settings,
        log=log,
        valkey=valkey,
        prepare_accounts=lambda: prepare_accounts(settings, home),
        report=report,
    )
    asked = asyncio.Event()
    asked_at = 0.0
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        nonlocal asked_at
        if asked.is_set():
            if time.monotonic() - asked_at < _ONE_REQUEST_S:
                return
            stack.kill()
            log.say("up", "killed everything")
            log.close()
            os._exit(128 + signal.SIGINT)
        asked_at = time.monotonic()
        asked.set()

    for number in _STOP_SIGNALS:
        # Under nohup a hang-up is ignored, and stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)
    starting = asyncio.create_task(stack.start())
    stopping = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            try:
                _announce(starting.result(), log)
            except _START_ERRORS as error:
                line = " ".join(str(error).split())
                log.say("up", f"giving up: {line}")
                return FAILED
            await stopping
        log.say("up", "stopping (again to kill)")
        return 0
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError, *_START_ERRORS):
            await starting
        await stack.stop()
        log.say("up", "stopped")


def _announce(run: RunFile, log: MergedLog) -> None:
    line = {
        "ready": True,
        "api": run.api,
        "flower": run.flower,
        "metrics": run.metrics,
        "admin_key": run.admin_key,
    }
    # The reader may be gone; the stack is wanted all the same.
    with suppress(OSError):
        print(json.dumps(line), flush=True)
    log.say("up", f"ready: {run.api}" + (f", Flower {run.flower}" if run.flower else ""))
