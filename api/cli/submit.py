"""`forebay submit`: one prompt in, one answer out."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from api.cli.console import print_json, stderr
from api.cli.context import json_option, resolve, target_options
from api.cli.failures import MISUSED, CommandError
from api.cli.remote import remote
from api.client import AsyncClient, JobEvent, RemoteJob
from broker.jobs import BANDS
from config import catalogue

_CHAT = "/v1/chat/completions"


@click.command()
@click.argument("prompt")
@click.option("--model", help="Name in the catalogue; its first chat model if absent.")
@click.option("--stream", is_flag=True, help="Print the answer while it is made.")
@click.option("--priority", type=click.Choice([band.value for band in BANDS]))
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@json_option
@target_options
def submit(
    prompt: str,
    model: str | None,
    stream: bool,
    priority: str | None,
    max_tokens: int,
    as_json: bool,
    data_dir: Path | None,
    api_url: str | None,
    api_key: str | None,
) -> None:
    """Send PROMPT (`-` reads it from stdin) as a chat job and print the answer.

    Ctrl-C cancels the job. With --json the job object is printed; with --stream as well, one event
    a line, of which the last holds the job object.
    """
    body: dict[str, Any] = {
        "model": model or _first_chat_model(data_dir),
        "messages": [{"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt}],
        "max_tokens": max_tokens,
    }
    if stream:
        body["stream"] = True

    async def run(client: AsyncClient) -> RemoteJob:
        job = await client.submit(_CHAT, body, priority=priority)
        try:
            if stream:
                await _print_stream(client, job.id, as_json=as_json)
                return await client.get(job.id)
            return await _wait(client, job)
        except asyncio.CancelledError:
            await client.cancel(job.id)
            raise

    try:
        job = remote(run, data_dir=data_dir, url=api_url, key=api_key)
    except KeyboardInterrupt:
        raise CommandError("interrupted; the job was cancelled", exit_code=130) from None
    if not stream and as_json:
        print_json(job.raw)
    elif not stream and job.status == "completed":
        click.echo(answer(job))
    if job.status != "completed":
        error = job.error or {}
        raise CommandError(
            f"{job.id} {job.status}: {error.get('code', '')} {error.get('message', '')}"
        )


def answer(job: RemoteJob) -> str:
    """The text of a finished chat."""
    return str(job.output["choices"][0]["message"]["content"])


class StreamedText:
    """Text of a job from its events, whatever restarts and gaps there were."""

    def __init__(self) -> None:
        self.text = ""

    def take(self, event: JobEvent) -> str:
        """What the event adds to the text shown so far; a restart begins on a new line."""
        if event.type == "job.delta":
            self.text += event.text
            return event.text
        if event.type == "job.snapshot":
            new = event.text.removeprefix(self.text)
            restarted = new == event.text and self.text
            self.text = event.text
            return f"\n{new}" if restarted else new
        if event.type == "job.requeued" and self.text:
            self.text = ""
            return "\n"
        return ""


async def _print_stream(client: AsyncClient, job_id: str, *, as_json: bool) -> None:
    text = StreamedText()
    async for event in client.events(job_id):
        if as_json:
            click.echo(json.dumps({"seq": event.seq, "type": event.type, **event.data}))
        else:
            click.echo(text.take(event), nl=False)
    if not as_json:
        click.echo()


async def _wait(client: AsyncClient, job: RemoteJob) -> RemoteJob:
    console = stderr()
    if not console.is_terminal:
        return await client.wait(job.id)
    with console.status(f"{job.id}: {job.status}") as status:
        while not job.is_terminal:
            job = await client.get(job.id, wait_s=1)
            position = (job.raw.get("queue") or {}).get("position")
            where = f", {position} before it" if position else ""
            status.update(f"{job.id}: {job.status}{where}")
    return job


def _first_chat_model(data_dir: Path | None) -> str:
    for name, spec in catalogue.load(resolve(data_dir).models.catalogue).items():
        if spec.kind == "chat":
            return name
    raise CommandError("the catalogue has no chat model: give --model", exit_code=MISUSED)
