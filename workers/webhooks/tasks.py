"""The Celery task of the webhook worker: one attempt of one delivery."""

from __future__ import annotations

from collections.abc import Callable

from celery import Task, shared_task

#: Its queue; a plain Celery queue, whose messages may get lost without harm: leases run out.
QUEUE = "webhooks"

_deliver: Callable[[str, int], str] | None = None


def install(deliver: Callable[[str, int], str]) -> None:
    """Make `deliver` what this process's tasks call."""
    global _deliver
    _deliver = deliver


@shared_task(name="forebay.deliver_webhook", base=Task, acks_late=False, ignore_result=True)  # type: ignore[untyped-decorator]
def deliver_webhook(delivery_id: str, attempt: int) -> str:
    """The message names a lease; everything about the delivery is in its record."""
    if _deliver is None:
        raise RuntimeError(
            "this process sends no webhooks; start it as `python -m workers webhooks`"
        )
    return _deliver(delivery_id, attempt)
