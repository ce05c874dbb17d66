"""`python -m workers`: run a worker, or look after the model cache.

python -m workers --model NAME [--name N]   run one worker process
python -m workers webhooks                  run one process that sends webhooks
python -m workers pull NAME…                fetch and convert models; JSON progress lines
python -m workers list                      catalogue and cache as JSON
python -m workers verify NAME…              check fetched models against their digests; JSON
python -m workers kernel                    build the compiled kernel, or say why it can't be
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from typing import NoReturn

import orjson

from config import catalogue, logs
from config.settings import Settings, SettingsError, load
from workers.pinning import pin


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 bad settings or arguments."""
    arguments = _parser().parse_args(argv)
    try:
        settings = load()
        models = catalogue.load(settings.models.catalogue)
        if arguments.command == "pull":
            return _pull(settings, models, arguments.names)
        if arguments.command == "list":
            return _list(settings, models)
        if arguments.command == "verify":
            return _verify(settings, models, arguments.names)
        if arguments.command == "kernel":
            return _kernel(settings)
        if arguments.command == "webhooks":
            return _webhooks(settings)
        if arguments.model is None:
            raise SettingsError("name a model: python -m workers --model NAME")
        spec = _known(models, arguments.model)
        pin(settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log, process=f"worker:{spec.name}")
    objection = _objection(settings)
    if objection is not None:
        print(objection, file=sys.stderr)
        return 2
    from workers.bootstrap import WorkerProcess
    from workers.engines.kernels.building import KernelError
    from workers.sources import SourceError

    try:
        return WorkerProcess(settings, spec, name=arguments.name or spec.name).run()
    except (SourceError, KernelError) as error:
        print(error, file=sys.stderr)
        return 1


def _webhooks(settings: Settings) -> int:
    """Raises `SettingsError` when there is no key to sign with."""
    logs.configure(settings.log, process="webhooks")
    objection = _objection(settings)
    if objection is not None:
        print(objection, file=sys.stderr)
        return 2
    from workers.webhooks.process import WebhookProcess

    return WebhookProcess(settings).run()


def _objection(settings: Settings) -> str | None:
    """Why no worker can ever work on this Redis. One that is away may come back."""
    from broker.connections import check_server, connect
    from broker.errors import BrokerError, BrokerUnavailableError

    with connect(settings.redis) as client:
        try:
            check_server(client)
        except BrokerUnavailableError:
            return None
        except BrokerError as error:
            return str(error)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="name in the catalogue; also the queue it serves")
    parser.add_argument("--name", help="node name shown by consoles; default: the model's name")
    commands = parser.add_subparsers(dest="command")
    pull = commands.add_parser("pull", help="fetch and convert models")
    pull.add_argument("names", nargs="+", metavar="NAME")
    commands.add_parser("list", help="catalogue and cache as JSON")
    verify = commands.add_parser("verify", help="check fetched models against their digests")
    verify.add_argument("names", nargs="+", metavar="NAME")
    commands.add_parser("kernel", help="build the compiled kernel")
    commands.add_parser("webhooks", help="send webhooks")
    return parser


def _known(models: dict[str, catalogue.ModelSpec], name: str) -> catalogue.ModelSpec:
    if name not in models:
        raise SettingsError(f"no model {name!r} in the catalogue; it has {', '.join(models)}")
    return models[name]


def _pull(settings: Settings, models: dict[str, catalogue.ModelSpec], names: list[str]) -> int:
    pin(settings)
    from workers.sources import SourceError, ensure

    def report(model: str, stage: str, fraction: float) -> None:
        line = {"model": model, "stage": stage, "fraction": round(fraction, 4)}
        print(orjson.dumps(line).decode(), flush=True)

    for spec in [_known(models, name) for name in names]:
        try:
            ensure(spec, settings.models, progress=report)
        except SourceError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _list(settings: Settings, models: dict[str, catalogue.ModelSpec]) -> int:
    from workers.sources import cached_folder

    rows = []
    for spec in models.values():
        folder = cached_folder(spec, settings.models)
        rows.append(
            {
                "model": spec.name,
                "kind": spec.kind,
                "source": spec.source,
                "description": spec.description,
                "cached": folder is not None,
                "path": str(folder) if folder else None,
            }
        )
    print(orjson.dumps(rows).decode())
    return 0


def _verify(settings: Settings, models: dict[str, catalogue.ModelSpec], names: list[str]) -> int:
    from workers.checkpoints import verify
    from workers.sources import cached_folder

    rows = []
    for spec in [_known(models, name) for name in names]:
        folder = cached_folder(spec, settings.models)
        problems = ["not fetched yet"] if folder is None else verify(spec, folder)
        rows.append({"model": spec.name, "problems": problems})
    print(orjson.dumps(rows).decode())
    return 1 if any(row["problems"] for row in rows) else 0


def _kernel(settings: Settings) -> int:
    from workers.engines.kernels.building import KernelError, built, isa

    try:
        if not (which := isa()):
            raise KernelError("the processor has no AVX-512")
        print(f"{which}: {built(settings.models, which)}")
    except KernelError as error:
        print(f"{error}; workers compute with torch alone", file=sys.stderr)
        return 1 if settings.worker.kernel == "compiled" else 0
    return 0


def leave(code: int) -> NoReturn:
    """End the process now, whatever its threads do.

    The interpreter's own way out waits for a thread that is stuck inside the model, for ever, and
    for torch to take its threads down, for seconds. By now every job is settled or given back.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> NoReturn:
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    _run()
