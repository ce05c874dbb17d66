"""The Celery tasks: run a leased job; with tickets, run whatever job is next."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from broker.tickets import TASK
from workers.runner import Runner
from workers.turns import Turns

_runner: Runner | None = None
_turns: Turns | None = None


def install(runner: Runner, turns: Turns | None = None) -> None:
    """Make `runner` the one that this process's tasks use; `turns`: it works by tickets."""
    global _runner, _turns
    _runner, _turns = runner, turns


@shared_task(name="forebay.run_job")  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Run a job whose lease this process holds; everything about it is in the lease's record."""
    if _runner is None:
        raise RuntimeError("this process has no engine; start it as `python -m workers`")
    _runner.run(job_id)


@shared_task(name=TASK, bind=True, Request="workers.requests:TicketRequest")  # type: ignore[untyped-decorator]
def run_ticket(task: Any) -> str | None:
    """Claim what is next and run it; returns its id, which consoles show, or nothing."""
    if _turns is None:
        raise RuntimeError("this process takes no tickets; set FOREBAY_QUEUE__BROKER_URL")
    return _turns.take(task.request.id)
