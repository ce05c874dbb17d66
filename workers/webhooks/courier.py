"""From what happened to what was delivered: fans events out, hands out what is due, records."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import redis.asyncio

from broker import keys
from broker.connections import translate
from broker.errors import BrokerError
from broker.webhooks import events, signing
from broker.webhooks.deliveries import Delivery, NewDelivery, State, Try
from broker.webhooks.endpoints import RESPONSE_EVENT_TYPES, Endpoint, JobWebhook
from broker.webhooks.outbox import OutboxEvent
from broker.webhooks.schedule import delay_s
from broker.webhooks.store import LEASE_SLACK_S, WebhookStore
from config.logs import get_logger
from config.settings import Webhooks as WebhookSettings
from workers.webhooks.metrics import WebhookMetrics
from workers.webhooks.sender import Answer, Sender

log = get_logger(__name__)

#: Events made into deliveries in one step.
FAN_OUT = 64
#: Longest wait for the bell: a lost one costs this much, and so does a retry's punctuality.
IDLE_S = 1.0
#: Pause after Redis or the Celery broker failed.
FAILURE_PAUSE_S = 0.5


class Courier:
    """Works in one event loop. `dispatch` hands a leased delivery's id and attempt to a task."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        settings: WebhookSettings,
        sender: Sender,
        *,
        key: bytes,
        dispatch: Callable[[str, int], Awaitable[None]],
        metrics: WebhookMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._settings = settings
        self._store = WebhookStore(client, settings)
        self._sender = sender
        self._key = key
        self._dispatch = dispatch
        self._metrics = metrics
        self._clock = clock
        #: Claimed here and not yet begun by a task, each with the time (monotonic) until which it
        #: may begin without asking whether its lease still stands. Oldest first.
        self._claimed: dict[tuple[str, int], tuple[Delivery, float]] = {}

    async def run(self) -> None:
        """Until cancelled. Whatever fails is tried again: all of it is in Redis."""
        failing = False
        while True:
            try:
                wait_s = await self.turn()
                failing = False
                if wait_s:
                    await self._wait(wait_s)
            except BrokerError as error:
                if not failing:
                    log.warning("webhooks_interrupted", why=str(error))
                failing = True
                await asyncio.sleep(FAILURE_PAUSE_S)

    async def turn(self) -> float:
        """Fan out some events, hand out what is due; returns how long there is nothing to do."""
        self._forget_lost()
        made = await self.fan_out()
        claims, next_s = await self._store.claim(self._settings.max_in_flight)
        for delivery in claims:
            fresh_until = time.monotonic() + LEASE_SLACK_S
            self._claimed[delivery.id, delivery.attempt] = delivery, fresh_until
            try:
                await self._dispatch(delivery.id, delivery.attempt)
            except Exception as error:
                # Its lease runs out, and it is due again.
                self._claimed.pop((delivery.id, delivery.attempt), None)
                log.warning("webhook_not_dispatched", delivery_id=delivery.id, why=repr(error))
        self._metrics.backlog(await self._store.backlog())
        if made or claims:
            return 0.0
        return IDLE_S if next_s is None else max(0.02, min(IDLE_S, next_s))

    def _forget_lost(self) -> None:
        """Claims whose message got lost; or comes late, and then asks for its lease."""
        now = time.monotonic()
        for key in [key for key, (_, until) in self._claimed.items() if until < now]:
            del self._claimed[key]

    async def _wait(self, wait_s: float) -> None:
        try:
            await self._client.blpop([keys.WEBHOOK_BELL], timeout=wait_s)
        except (redis.RedisError, OSError) as error:
            raise translate(error) from error

    # -- events -----------------------------------------------------------------------------------
    async def fan_out(self) -> int:
        """Make deliveries of the oldest events; how many events that were."""
        raw = await self._store.outbox(FAN_OUT)
        if not raw:
            return 0
        endpoints: dict[str, list[Endpoint]] = {}
        deliveries: list[NewDelivery] = []
        for line in raw:
            try:
                event = OutboxEvent.from_json(line)
                if event.tenant not in endpoints:
                    endpoints[event.tenant] = await self._endpoints(event.tenant)
                deliveries += await self._deliveries(event, endpoints[event.tenant])
            except (ValueError, KeyError, TypeError):
                # Written by a version that knows more: it must not hold up all others.
                log.exception("webhook_event_unreadable")
        made = await self._store.put(raw, deliveries)
        if made > 0:
            log.info("webhook_deliveries_made", events=len(raw), deliveries=made)
        return len(raw)

    async def _endpoints(self, tenant: str) -> list[Endpoint]:
        """Those that take messages now."""
        published = await self._store.endpoints(tenant)
        found = [Endpoint.from_json(raw) for raw in published.values()]
        health = await self._store.health([each.id for each in found])
        return [
            endpoint
            for endpoint, seen in zip(found, health, strict=True)
            if endpoint.enabled and not seen.disabled_ms
        ]

    async def _deliveries(
        self, event: OutboxEvent, endpoints: Sequence[Endpoint]
    ) -> list[NewDelivery]:
        wanted = [each for each in endpoints if each.wants(event.type)]
        as_response = event.job and any(map(_wants_responses, endpoints))
        own = JobWebhook.from_json(event.webhook) if event.webhook else None
        if own is not None and event.type not in own.event_types:
            own = None
        if not wanted and own is None and not as_response:
            return []
        if not event.job:
            if event.batch:
                body = events.id_message(event.id, event.type, event.ms, event.batch)
            else:
                body = events.disabled_message(event)
            return [self._new(event, each.url, body, endpoint=each.id) for each in wanted]
        with_output = [each.include_output for each in (*wanted, own) if each is not None]
        record, output = await self._store.job_record(
            event.job, events.JOB_FIELDS, output=any(with_output)
        )
        bodies = {
            included: events.job_message(
                event,
                record,
                output if included else None,
                most_bytes=self._settings.max_body_bytes,
            )
            for included in set(with_output)
        }
        # An output isn't kept for longer with a message than with its job.
        keeps = {True: int(record.get("result_ttl_s") or 0), False: 0}
        made = [
            self._new(event, each.url, bodies[each.include_output], endpoint=each.id,
                      keep_s=keeps[each.include_output])
            for each in wanted
        ]  # fmt: skip
        if own is not None:
            keep_s, body = keeps[own.include_output], bodies[own.include_output]
            made.append(self._new(event, own.url, body, keep_s=keep_s))
        if as_response and record.get("endpoint") == events.RESPONSES.encode():
            made += await self._of_response(event, endpoints)
        return made

    async def _of_response(
        self, event: OutboxEvent, endpoints: Sequence[Endpoint]
    ) -> list[NewDelivery]:
        """The end of a job once more, under its name as a response."""
        record, output = await self._store.job_record(event.job, ("body",), output=True)
        kind = events.response_event(event, record.get("body"), output)
        if kind is None:
            return []
        event_id = f"{event.id}_response"
        body = events.id_message(event_id, kind, event.ms, events.response_id(event.job))
        return [
            replace(
                self._new(event, each.url, body, endpoint=each.id),
                event_id=event_id,
                event_type=kind,
            )
            for each in endpoints
            if each.wants(kind)
        ]

    def _new(
        self, event: OutboxEvent, url: str, body: bytes, *, endpoint: str = "", keep_s: int = 0
    ) -> NewDelivery:
        return NewDelivery(
            tenant=event.tenant,
            url=url,
            event_id=event.id,
            event_type=event.type,
            body=body,
            endpoint=endpoint,
            job=event.job,
            keep_s=keep_s,
        )

    # -- attempts ---------------------------------------------------------------------------------
    async def deliver(self, delivery_id: str, attempt: int) -> str:
        """One attempt of a leased delivery; how it ended, `stale` when the lease is another's."""
        kept, until = self._claimed.pop((delivery_id, attempt), (None, 0.0))
        fresh = kept is not None and time.monotonic() < until
        delivery = kept if fresh else await self._store.leased(delivery_id, attempt)
        if delivery is None:
            return self._ended("stale", delivery_id, attempt, None)
        endpoint, health, versions = await self._store.target(delivery)
        now = self._clock()
        if delivery.endpoint and (endpoint is None or not endpoint.enabled or health.disabled_ms):
            error = "endpoint_deleted" if endpoint is None else "endpoint_disabled"
            one = Try(ms=int(now * 1000), duration_ms=0, error=error)
            await self._store.record(delivery, one, "failed", counts=False)
            return self._ended("failed", delivery_id, attempt, None, error)
        signer = delivery.endpoint or signing.job_signer(delivery.tenant)
        secrets = [
            signing.secret(self._key, signer, version)
            for version in versions.versions(int(now * 1000))
        ]
        headers = signing.headers(secrets, delivery.event_id, int(now), delivery.body)
        # Where the endpoint is now: its owner may have moved it since.
        url = endpoint.url if endpoint is not None else delivery.url
        answer = await self._sender.send(url, delivery.body, headers)
        one = Try(
            ms=int(now * 1000),
            duration_ms=answer.duration_ms,
            status=answer.status,
            error=answer.error,
        )
        state, wait_s = self._verdict(delivery, answer)
        written = await self._store.record(delivery, one, state, delay_s=wait_s, gone=answer.gone)
        if written == 2:
            log.warning("webhook_endpoint_disabled", endpoint_id=delivery.endpoint)
        outcome = "stale" if written == 0 else "retried" if state == "pending" else state
        return self._ended(outcome, delivery_id, attempt, answer, answer.error)

    def _verdict(self, delivery: Delivery, answer: Answer) -> tuple[State, float]:
        if answer.ok:
            return "delivered", 0.0
        if answer.gone:
            return "failed", 0.0
        wait_s = delay_s(
            self._settings.retry_plan, delivery.failures + 1, retry_after_s=answer.retry_after_s
        )
        return ("failed", 0.0) if wait_s is None else ("pending", wait_s)

    def _ended(
        self, outcome: str, delivery_id: str, attempt: int, answer: Answer | None, error: str = ""
    ) -> str:
        self._metrics.attempt_ended(outcome, answer.duration_ms / 1000 if answer else None)
        log.info(
            "webhook_attempt_ended",
            delivery_id=delivery_id,
            attempt=attempt,
            outcome=outcome,
            status=answer.status if answer else 0,
            error=error,
        )
        return outcome


def _wants_responses(endpoint: Endpoint) -> bool:
    return any(map(endpoint.wants, RESPONSE_EVENT_TYPES))


async def drop_cancelled(task: asyncio.Task[None]) -> None:
    """End a task and wait for it."""
    # Again and again: redis-py uses `asyncio.wait_for`, which in Python 3.11 can swallow one.
    while not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=0.1)
