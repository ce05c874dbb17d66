"""The one Celery task: run a leased job."""

from __future__ import annotations

from celery import shared_task

from workers.runner import Runner

_runner: Runner | None = None


def install(runner: Runner) -> None:
    """Make `runner` the one that this process's tasks use."""
    global _runner
    _runner = runner


@shared_task(name="forebay.run_job")  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Run a job whose lease this process holds; everything about it is in the lease's record."""
    if _runner is None:
        raise RuntimeError("this process has no engine; start it as `python -m workers`")
    _runner.run(job_id)
