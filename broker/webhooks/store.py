"""Endpoints, deliveries and the schedule of attempts in Redis, for an event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from broker import keys, scripts
from broker.call import Call, number, script_call, truth
from broker.connections import translate
from broker.exchange import Exchange
from broker.webhooks.deliveries import Delivery, NewDelivery, State, Try
from broker.webhooks.endpoints import Endpoint, Health, Signing
from broker.wire import Arg, pairs
from config.settings import Webhooks as WebhookSettings

T = TypeVar("T")

#: A log that gets no more entries is forgotten after this long.
_LOG_MS = 30 * 86_400_000
#: A worker that is silent for this long after an attempt's own bound has lost it.
LEASE_SLACK_S = 5.0


class WebhookStore:
    """Every call may raise `BrokerUnavailableError`; every write may be repeated without harm."""

    def __init__(self, client: redis.asyncio.Redis, settings: WebhookSettings) -> None:
        self._exchange = Exchange(client)
        self._settings = settings

    async def _run(self, call: Call[T]) -> T:
        repeated = False
        while True:
            try:
                replies = await self._exchange.send(call.commands)
                if isinstance(replies[0], NoScriptError):
                    replies = await self._exchange.send(call.by_source)
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply
            except RedisConnectionError as error:
                if type(error) is not RedisConnectionError or repeated:
                    raise translate(error) from error
                repeated = True
            except (RedisError, OSError) as error:
                raise translate(error) from error
            else:
                return call.decode(replies, repeated)

    async def _send(self, *commands: Sequence[Arg]) -> list[Any]:
        calls = tuple(tuple(command) for command in commands)
        return await self._run(Call(calls, lambda replies, _: replies)) if calls else []

    # -- endpoints --------------------------------------------------------------------------------
    async def endpoints(self, tenant: str) -> dict[str, bytes]:
        """What is published of a tenant's endpoints: id → JSON."""
        (raw,) = await self._send(("HGETALL", keys.webhook_endpoints(tenant)))
        return {name.decode(): value for name, value in pairs(raw).items()}

    async def tenants(self) -> list[str]:
        """Tenants with published endpoints."""
        (raw,) = await self._send(("SMEMBERS", keys.WEBHOOK_TENANTS))
        return [name.decode() for name in raw]

    async def job_signings(self) -> dict[str, bytes]:
        """What is published of how tenants' single webhooks are signed."""
        (raw,) = await self._send(("HGETALL", keys.WEBHOOK_JOB_SECRETS))
        return {name.decode(): value for name, value in pairs(raw).items()}

    async def mirror(
        self, key: str, field: str, seen: bytes, wanted: bytes, *, tenant: str = ""
    ) -> bool:
        """Publish what the database has; False when somebody else has changed it since `seen`.

        Empty is: not there. `tenant`: whose endpoints `key` is.
        """
        call = script_call(
            scripts.WEBHOOK_MIRROR, truth, (key, keys.WEBHOOK_TENANTS), field, seen, wanted, tenant
        )
        return await self._run(call)

    async def health(self, endpoint_ids: Sequence[str]) -> list[Health]:
        replies = await self._send(
            *(("HGETALL", keys.webhook_health(each)) for each in endpoint_ids)
        )
        return [Health.from_hash(pairs(raw)) for raw in replies]

    async def enable(self, endpoint_id: str) -> None:
        """Forget why it was disabled, and that it ever failed."""
        await self._send(
            ("HDEL", keys.webhook_health(endpoint_id), "disabled_ms", "reason", "failing_ms")
        )

    async def forget(self, endpoint_id: str) -> None:
        """Its log and health; what waits fails at its next turn."""
        await self._send(("DEL", keys.webhook_health(endpoint_id), keys.webhook_log(endpoint_id)))

    # -- outbox -----------------------------------------------------------------------------------
    async def outbox(self, limit: int) -> list[bytes]:
        """The oldest events, which stay there until they are `put`."""
        (raw,) = await self._send(("LRANGE", keys.WEBHOOK_OUTBOX, 0, limit - 1))
        found: list[bytes] = raw
        return found

    async def job_record(
        self, job_id: str, names: Sequence[str], *, output: bool
    ) -> tuple[dict[str, bytes], bytes | None]:
        """Fields of a job's record that are there, and its output where that is wanted."""
        wanted = (*names, "output") if output else names
        (raw,) = await self._send(("HMGET", keys.job(job_id), *wanted))
        found = {name: value for name, value in zip(wanted, raw, strict=True) if value is not None}
        return found, found.pop("output", None)

    async def put(self, done: Sequence[bytes], deliveries: Sequence[NewDelivery]) -> int:
        """Make deliveries, and take the events they come from out of the outbox, in one step.

        Returns how many are new; -1: somebody else has seen to these events.
        """
        settings = self._settings
        flat: list[Arg] = []
        for each in deliveries:
            fields: list[Arg] = [
                "url", each.url, "event_id", each.event_id, "event_type", each.event_type,
                "endpoint", each.endpoint, "job", each.job, "keep_s", each.keep_s,
                "body", each.body,
            ]  # fmt: skip
            flat += (each.id, each.group, each.tenant, each.log, len(fields), *fields)
        call = script_call(
            scripts.WEBHOOK_PUT, number, (keys.WEBHOOK_OUTBOX,),
            len(done), done[0] if done else "", settings.max_pending, settings.log_entries, _LOG_MS,
            settings.max_in_flight_per_endpoint, settings.log_ttl_s, *flat,
        )  # fmt: skip
        return await self._run(call)

    # -- sending ----------------------------------------------------------------------------------
    async def claim(self, limit: int) -> tuple[list[Delivery], float | None]:
        """Lease what is due, and say in how many seconds the next one is (None: none is)."""
        settings = self._settings

        def decode(reply: Any, _: bool) -> tuple[list[Delivery], float | None]:
            found = [
                Delivery.from_hash(reply[k].decode(), pairs(reply[k + 1]))
                for k in range(1, len(reply), 2)
            ]
            return found, reply[0] / 1000 if reply[0] >= 0 else None

        call = script_call(
            scripts.WEBHOOK_CLAIM, decode, (),
            int((settings.timeout_s + LEASE_SLACK_S) * 1000), limit,
            settings.max_in_flight_per_endpoint, max(1, settings.max_in_flight // 2),
            settings.max_in_flight,
        )  # fmt: skip
        return await self._run(call)

    async def leased(self, delivery_id: str, attempt: int) -> Delivery | None:
        """The delivery if this attempt still holds its lease."""
        lease, raw = await self._send(
            ("ZSCORE", keys.WEBHOOK_LEASES, delivery_id),
            ("HGETALL", keys.webhook_delivery(delivery_id)),
        )
        if lease is None or not raw:
            return None
        found = Delivery.from_hash(delivery_id, pairs(raw))
        return found if found.attempt == attempt else None

    async def target(self, delivery: Delivery) -> tuple[Endpoint | None, Health, Signing]:
        """The endpoint of a delivery as it is now (None: deleted), its health, and what signs.

        Of a single job's webhook only the last.
        """
        if not delivery.endpoint:
            (raw,) = await self._send(("HGET", keys.WEBHOOK_JOB_SECRETS, delivery.tenant))
            return None, Health(), Signing.from_json(raw)
        raw, health = await self._send(
            ("HGET", keys.webhook_endpoints(delivery.tenant), delivery.endpoint),
            ("HGETALL", keys.webhook_health(delivery.endpoint)),
        )
        endpoint = Endpoint.from_json(raw) if raw else None
        signing = endpoint.signing if endpoint else Signing()
        return endpoint, Health.from_hash(pairs(health)), signing

    async def record(
        self,
        delivery: Delivery,
        one: Try,
        state: State,
        *,
        delay_s: float = 0.0,
        gone: bool = False,
        counts: bool = True,
    ) -> int:
        """Write down an attempt: 1 done, 2 its endpoint was disabled with it, 0 stale.

        `counts`: it says something about the health of its endpoint.
        """
        settings = self._settings
        keep_s = min(settings.log_ttl_s, delivery.keep_s or settings.log_ttl_s)
        call = script_call(
            scripts.WEBHOOK_RECORD, number, (keys.webhook_delivery(delivery.id),),
            delivery.id, delivery.attempt, state, int(delay_s * 1000), keep_s,
            settings.max_in_flight_per_endpoint, delivery.endpoint if counts else "", int(gone),
            int(settings.disable_after_s * 1000), "tries", delivery.tries_with(one),
        )  # fmt: skip
        return await self._run(call)

    # -- log --------------------------------------------------------------------------------------
    async def delivery(self, delivery_id: str, tenant: str) -> Delivery | None:
        """A tenant's delivery, without its body; None when there is none (of this tenant)."""
        found = (await self._deliveries([delivery_id]))[0]
        return found if found and found.tenant == tenant else None

    async def deliveries(
        self, log: str, *, after: str = "", limit: int, states: Sequence[State] = ()
    ) -> tuple[list[Delivery], bool]:
        """A page of a log, newest first, and whether more follow. A log is small enough to be read
        as a whole."""
        (raw,) = await self._send(("ZREVRANGE", keys.webhook_log(log), 0, -1))
        ids = [each.decode() for each in raw]
        if after:
            ids = ids[ids.index(after) + 1 :] if after in ids else []
        found: list[Delivery] = []
        for start in range(0, len(ids), 100):
            for each in await self._deliveries(ids[start : start + 100]):
                if each and (not states or each.state in states):
                    found.append(each)
            if len(found) > limit:
                break
        return found[:limit], len(found) > limit

    async def _deliveries(self, ids: Sequence[str]) -> list[Delivery | None]:
        names = (
            "tenant", "url", "event_id", "event_type", "endpoint", "job", "state", "attempt",
            "failures", "created_ms", "next_ms", "ended_ms", "keep_s", "tries",
        )  # fmt: skip
        replies = await self._send(*(("HMGET", keys.webhook_delivery(i), *names) for i in ids))
        found: list[Delivery | None] = []
        for delivery_id, raw in zip(ids, replies, strict=True):
            fields: Mapping[bytes, bytes] = {
                name.encode(): value for name, value in zip(names, raw, strict=True) if value
            }
            found.append(Delivery.from_hash(delivery_id, fields) if b"state" in fields else None)
        return found

    async def again(self, delivery_id: str, tenant: str) -> bool:
        """Send a delivery once more, now and with all its attempts; False when there is none."""
        call = script_call(
            scripts.WEBHOOK_AGAIN, number, (keys.webhook_delivery(delivery_id),),
            delivery_id, tenant, self._settings.max_in_flight_per_endpoint,
        )  # fmt: skip
        return await self._run(call) == 1

    async def backlog(self) -> dict[str, int]:
        """Events in the outbox, deliveries being sent, and what bounds have cost so far."""
        outbox, sending, counts = await self._send(
            ("LLEN", keys.WEBHOOK_OUTBOX),
            ("ZCARD", keys.WEBHOOK_LEASES),
            ("HGETALL", keys.WEBHOOK_COUNTS),
        )
        lost = {name.decode(): int(value) for name, value in pairs(counts).items()}
        return {"outbox": outbox, "sending": sending, "overflowed": 0, "discarded": 0, **lost}
