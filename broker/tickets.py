"""Tickets: how workers get their turns over RabbitMQ, while jobs stay in Redis.

A ticket says that a model has work, and nothing of which. Whoever takes one claims from Redis what
is next there; with nothing to claim the ticket is spent for nothing. So tickets may be lost,
doubled or late, and neither order nor number of jobs changes by it.

Workers issue them, each from a thread of its own. The bell which the queue's scripts ring whenever
there is something to claim (a new job, one given back, a tenant below its cap again) wakes one of
them; it counts what could be claimed, asks RabbitMQ how many tickets wait, and issues the rest.
Without a ring each looks twice a second, which takes back expired leases, lets delayed jobs in, and
makes up for tickets and rings that were lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any
from uuid import uuid4

import kombu
import orjson
import redis
from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError

from broker import keys
from broker.connections import translate
from broker.errors import BrokerError, BrokerUnavailableError
from broker.queue import JobQueue
from config.logs import get_logger
from config.settings import Queue as QueueSettings

log = get_logger(__name__)

#: The task of a ticket.
TASK = "forebay.run_ticket"
#: Tickets that wait in RabbitMQ are made up to this number: at a look every `PAUSE_S` enough for
#: 25,000 starts a second of a model.
MOST_WAITING = 256
#: The shortest time between two looks of a worker (s). Rings that come meanwhile are one.
PAUSE_S = 0.01
#: The longest (s). It is part of what a crash costs: until then nobody sees that a lease ran out.
LOOK_EVERY_S = 0.5
#: Wait for an answer of RabbitMQ, and before it is tried again (s).
TIMEOUT_S = 5.0
RETRY_S = 0.5
#: Of a queue: classic whatever the virtual host's default is (tickets are neither replicated nor
#: kept on a disk), and with a bound that it never reaches unless others put tickets in.
ARGUMENTS = {"x-queue-type": "classic", "x-max-length": 100_000}

_BODY = orjson.dumps([[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
_HEADERS: dict[str, Any] = {
    "lang": "py",
    "task": TASK,
    "parent_id": None,
    "group": None,
    "retries": 0,
    "timelimit": [None, None],
    "argsrepr": "()",
    "kwargsrepr": "{}",
    "origin": "forebay",
    "ignore_result": True,
}
#: What a connection to RabbitMQ breaks with; a `socket.timeout` is an `OSError`.
_BREAKS = (AMQPError, KombuError, OSError)


def queue_name(model: str) -> str:
    """The queue in RabbitMQ that carries a model's tickets."""
    return f"forebay.tickets.{model}"


def ticket_queue(model: str) -> kombu.Queue:
    """That queue as Celery consumes it, through the default exchange."""
    name = queue_name(model)
    return kombu.Queue(
        name, kombu.Exchange(""), routing_key=name, durable=True, queue_arguments=ARGUMENTS
    )


class TicketOffice:
    """One model's queue in RabbitMQ, on a connection of its own. For one thread.

    Every method may raise `BrokerUnavailableError`; the next call then connects anew.
    """

    def __init__(self, settings: QueueSettings, model: str) -> None:
        self._name = queue_name(model)
        self._url = settings.broker_url.get_secret_value()
        self._connection: Any = None
        self._channel: Any = None
        #: Tickets sent on this channel, and those of them without a confirmation yet.
        self._sent = 0
        self._unconfirmed: set[int] = set()
        self._refused = 0

    def waiting(self) -> int:
        """Tickets that no worker has taken. Makes the queue where it is missing."""
        with self._connected():
            return self._declare()

    def issue(self, count: int) -> int:
        """Put tickets in and wait until RabbitMQ has confirmed them; returns how many it took.

        They aren't kept on its disk: after a restart the next look makes them anew.
        """
        with self._connected():
            self._refused = 0
            for _ in range(count):
                self._publish()
            deadline = monotonic() + TIMEOUT_S
            while self._unconfirmed:
                self._connection.drain_events(timeout=max(0.01, deadline - monotonic()))
            return count - self._refused

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with suppress(*_BREAKS):
                connection.release()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            self._connect()
            yield
        except _BREAKS as error:
            connection, self._connection, self._channel = self._connection, None, None
            if connection is not None:
                connection.collect(socket_timeout=1)
            # Texts of AMQP errors may name the user, never the password.
            raise BrokerUnavailableError(f"RabbitMQ can't be reached: {error}") from error

    def _declare(self) -> int:
        reply = self._channel.queue_declare(
            self._name, durable=True, auto_delete=False, arguments=ARGUMENTS
        )
        return int(reply.message_count)

    def _publish(self) -> None:
        ticket = str(uuid4())
        message = self._channel.prepare_message(
            _BODY,
            content_type="application/json",
            content_encoding="utf-8",
            headers=_HEADERS | {"id": ticket, "root_id": ticket},
            properties={"correlation_id": ticket, "delivery_mode": 1},
        )
        self._sent += 1
        self._unconfirmed.add(self._sent)
        self._channel.basic_publish(message, exchange="", routing_key=self._name)

    def _connect(self) -> None:
        if self._channel is not None:
            return
        connection = kombu.Connection(
            self._url,
            ssl=tls(self._url),
            connect_timeout=TIMEOUT_S,
            heartbeat=0,
            transport_options={"read_timeout": TIMEOUT_S, "write_timeout": TIMEOUT_S},
        )
        self._connection = connection
        channel = connection.channel()
        channel.confirm_select()
        channel.events["basic_ack"].add(self._confirmed)
        channel.events["basic_nack"].add(self._declined)
        self._sent = 0
        self._unconfirmed.clear()
        self._channel = channel

    def _confirmed(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed = {each for each in self._unconfirmed if each > tag}
        else:
            self._unconfirmed.discard(tag)

    def _declined(self, tag: int, multiple: bool) -> None:
        before = len(self._unconfirmed)
        self._confirmed(tag, multiple)
        self._refused += before - len(self._unconfirmed)


def tls(url: str) -> dict[str, Any] | bool:
    """TLS options of an `amqps://` URL: the server's certificate and name are checked.

    Without them kombu encrypts and asks for no certificate.
    """
    if not url.startswith("amqps://"):
        return False
    # The name is filled in from the URL.
    return {"server_hostname": None, "context": {"check_hostname": True}}


class TicketIssuer:
    """The thread that issues a model's tickets.

    `issued` is told how many at each time. That RabbitMQ or Redis is away is logged once an outage.
    """

    def __init__(
        self,
        office: TicketOffice,
        client: redis.Redis,
        queue: JobQueue,
        model: str,
        issued: Callable[[int], object],
    ) -> None:
        self._office = office
        self._client = client
        self._queue = queue
        self._model = model
        self._issued = issued
        self._stopping = threading.Event()
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="tickets", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes up to `LOOK_EVERY_S`, longer only while RabbitMQ doesn't answer."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * LOOK_EVERY_S)

    def look(self) -> int:
        """Issue what is missing; returns how many. Raises `BrokerError`."""
        wanted = self._queue.count_claimable(self._model, MOST_WAITING)
        if not wanted:
            return 0
        missing = wanted - self._office.waiting()
        if missing <= 0:
            return 0
        issued = self._office.issue(missing)
        self._issued(issued)
        return issued

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
                self._note_reachable()
                self._stopping.wait(PAUSE_S)
                self._await_bell()
            except BrokerUnavailableError as error:
                if self._reachable:
                    self._reachable = False
                    log.warning("tickets_not_issued", model=self._model, reason=str(error))
                self._stopping.wait(RETRY_S)
            except Exception:
                log.exception("ticket_look_failed", model=self._model)
                self._stopping.wait(RETRY_S)
        self._office.close()

    def _note_reachable(self) -> None:
        if not self._reachable:
            self._reachable = True
            log.info("tickets_issued_again", model=self._model)

    def _await_bell(self) -> None:
        try:
            self._client.brpop([keys.bell(self._model)], timeout=LOOK_EVERY_S)
        except (redis.RedisError, OSError) as error:
            broken: BrokerError = translate(error)
            raise broken from error
