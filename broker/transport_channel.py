"""kombu's Redis channel, with claims in place of messages for model queues.

A channel that consumes a model queue waits in one BRPOP for the queue's doorbell. A ring, a claim
that came back full and left work behind, or a second without a ring (which heals a lost one, and
takes back expired leases) makes the next command on that connection a claim; after a ring it is
sent at once, without another turn of the event loop. A claim asks for one job at first and
for twice as many while work keeps coming, so that a short queue spreads over idle workers and a
long one costs few round trips.

Batch jobs may fill a part of the slots only. A worker that has no room for more of them passes
batch work on to others by a bell of its own (`bell:batch`), which it doesn't wait for itself; the
end of one of its batch jobs wakes it.
"""

from __future__ import annotations

from queue import Empty
from time import monotonic
from typing import Any, Protocol, cast

from kombu.transport import redis
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from broker import keys, leases
from broker.errors import BrokerError
from broker.jobs import Claim
from broker.sentinel import Primary, PrimaryConnection, PrimarySSLConnection
from broker.transport_messages import JobMessage, delivery_tag
from broker.transport_qos import QoS
from config.logs import get_logger

log = get_logger(__name__)

#: Wait after Redis has refused a command, e.g. while it is out of memory (s).
REFUSED_PAUSE_S = 1.0
#: Jobs per claim where the transport option `claim_batch` says nothing.
CLAIM_BATCH = 4


class NotForMessagesError(BrokerError):
    """A model queue holds jobs, not messages: nothing is published to it, or purged from it."""

    def __init__(self, queue: str) -> None:
        super().__init__(f"{queue!r} is a model queue; jobs come in through JobQueue.enqueue")


class ClaimWire(Protocol):
    """What the transport needs of a queue to claim on a connection of its own."""

    def claim_command(
        self, queue: str, owner: str, limit: int, batch_room: int | None = None
    ) -> list[bytes | str | int]: ...

    def decode_claims(self, queue: str, reply: Any) -> list[Claim]: ...

    def more_waits(self, reply: Any) -> bool: ...

    def load_scripts(self) -> None: ...


class Channel(redis.Channel):  # type: ignore[misc]
    """kombu's Redis channel, with claims for model queues."""

    QoS = QoS
    from_transport_options = (
        *redis.Channel.from_transport_options,
        "model_queues",
        "claim_batch",
        "primary",
    )
    model_queues: frozenset[str] = frozenset()
    claim_batch: int = CLAIM_BATCH
    #: Finds the server, where Sentinels watch over it.
    primary: Primary | None = None

    #: The model queue this channel consumes.
    model_queue: str | None = None
    #: The next command is a claim.
    _due = False
    #: Jobs to ask for.
    _limit = 1
    #: Jobs asked for by the claim under way; 0 when none is.
    _asked = 0
    #: No command before this time (monotonic).
    _resume_at = 0.0
    #: The last refusal, to log each kind once.
    _refusal = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_queues = frozenset(self.model_queues)

    # -- consuming --------------------------------------------------------------------------------
    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any
    ) -> None:
        if queue in self.model_queues:
            registry = leases.current()
            if queue != registry.queue_name or no_ack:
                raise BrokerError(
                    f"{queue!r} can't be consumed: this worker leases {registry.queue_name!r}"
                )
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        if queue in self.model_queues:

            def deliver(claim: Claim) -> Any:
                message = JobMessage(claim, self)
                self.qos.append(message, message.delivery_tag)
                return callback(message)

            self.connection._callbacks[queue] = deliver
            self.model_queue = queue
            self._due = True

    def _basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super()._basic_cancel(consumer_tag)
        if queue is not None and queue == self.model_queue:
            self._leave()
            self.model_queue = None

    def close(self) -> None:
        if self.model_queue is not None:
            self._closing = True
            self._leave()
        super().close()

    def _leave(self) -> None:
        """End the command under way: hand back what a claim brings, stop waiting for the bell."""
        if not self._in_poll:
            return
        try:
            if self._asked:
                self._read_claims(deliver=False)
            elif self.active_queues in ([], [self.model_queue]):
                self.client.connection.disconnect()
        except Exception as error:  # the connection is gone, and with it the command
            log.debug("poll_ended", error=repr(error))

    # -- the poller's connection ------------------------------------------------------------------
    def _brpop_start(self, timeout: int | None = None) -> None:
        queue = self.model_queue
        if queue is None:
            super()._brpop_start(timeout)
            return
        if monotonic() < self._resume_at:
            return
        accepting = leases.current().accepting
        if accepting and self._due:
            self._send_claim(queue)
        else:
            self._send_brpop(queue, accepting, timeout or self.brpop_timeout)

    def _send_claim(self, queue: str) -> None:
        registry = leases.current()
        free = self.qos.can_consume_max_estimate()
        self._asked = max(1, min(self._limit, free, self.claim_batch))
        room = registry.batch_room()
        self._send(_wire(registry).claim_command(queue, registry.owner, self._asked, room))

    def _send_brpop(self, queue: str, accepting: bool, timeout: int) -> None:
        others = [q for q in self._queue_cycle.consume(len(self.active_queues)) if q != queue]
        stock = [self._q_for_pri(q, step) for step in self.priority_steps for q in others]
        awaited = [*self._bells(queue), *stock] if accepting else stock
        if awaited:
            self._asked = 0
            self._send(["BRPOP", *awaited, timeout])

    @staticmethod
    def _bells(queue: str) -> list[str]:
        registry = leases.current()
        if registry.wait_for_room():
            return [keys.bell(queue), keys.wake(queue, registry.owner)]
        return [keys.bell(queue), keys.batch_bell(queue)]

    def _send(self, command: list[Any]) -> None:
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        if self.model_queue is None:
            return bool(super()._brpop_read(**options))
        if self._asked:
            return self._read_claims(deliver=True)
        try:
            reply = self._parse("BRPOP")
        finally:
            self._end_poll()
        if not reply:
            self._due = True
            raise Empty
        key, item = reply[0].decode(), reply[1]
        # A bell, or a wake-up.
        if key.startswith(keys.base(self.model_queue)):
            self._due = True
            if self.qos.can_consume():
                self._brpop_start()
            raise Empty
        queue = key.rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self.connection._deliver(redis.loads(item.decode()), queue)
        return True

    def _read_claims(self, *, deliver: bool) -> bool:
        registry = leases.current()
        queue = registry.queue_name
        asked, self._asked = self._asked, 0
        try:
            reply = self._parse("EVALSHA")
        finally:
            self._end_poll()
        self._refusal = ""
        try:
            claims = _wire(registry).decode_claims(queue, reply)
        except Exception:  # their leases run out, and they are claimed again
            log.exception("claims_unreadable")
            self._due = False
            raise Empty from None
        self._due = len(claims) >= asked and _wire(registry).more_waits(reply)
        self._limit = min(2 * self._limit, self.claim_batch) if self._due else 1
        waiting = registry.add(claims)
        try:
            while waiting and deliver:
                self.connection._deliver(waiting[0], queue)
                del waiting[0]
        finally:
            for claim in waiting:
                registry.reject(delivery_tag(claim), requeue=True)
        return True

    def _end_poll(self) -> None:
        self._in_poll = None
        self._flush_brpop_reauth()

    def _parse(self, command: str) -> Any:
        """Read the reply. A refusal by Redis is logged and raises `Empty`: the worker goes on."""
        connection = self.client.connection
        try:
            return self.client.parse_response(connection, command)
        except NoScriptError:
            self._load_scripts()
        except ResponseError as error:
            self._resume_at = monotonic() + REFUSED_PAUSE_S
            refusal = str(error).partition(" ")[0]
            if refusal != self._refusal:
                self._refusal = refusal
                log.error("command_refused", command=command, error=str(error))
            if isinstance(error, ReadOnlyError):  # a former primary: connect anew
                connection.disconnect()
        except self.connection_errors:
            connection.disconnect()
            raise
        raise Empty

    def _load_scripts(self) -> None:
        try:
            _wire(leases.current()).load_scripts()
        except BrokerError as error:
            self._resume_at = monotonic() + REFUSED_PAUSE_S
            log.warning("scripts_not_loaded", error=str(error))
        else:
            log.info("scripts_loaded")

    # -- all else ---------------------------------------------------------------------------------
    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        if queue in self.model_queues:
            raise NotForMessagesError(queue)
        super()._put(queue, message, **kwargs)

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        if queue in self.model_queues:
            raise NotForMessagesError(queue)
        return super()._get(queue)

    def _purge(self, queue: str) -> int:
        if queue in self.model_queues:
            raise NotForMessagesError(queue)
        return int(super()._purge(queue))

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        if queue not in self.model_queues:
            super()._delete(queue, *args, **kwargs)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return queue in self.model_queues or bool(super()._has_queue(queue, **kwargs))

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """RESP2, as all of Forebay's clients: replies look the same everywhere."""
        if self.primary is not None:
            self.connection_class = PrimaryConnection
            self.connection_class_ssl = PrimarySSLConnection
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        if self.primary is not None:
            params |= self.primary.options
        return params | {"protocol": 2}


def _wire(registry: leases.LeaseRegistry) -> ClaimWire:
    return cast(ClaimWire, registry.queue)
