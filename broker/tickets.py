"""Tickets: how workers get their turns over RabbitMQ, while jobs stay in Redis.

A ticket says that a model has work, and nothing of which. Whoever takes one claims from Redis what
is next there; with nothing to claim the ticket is spent for nothing. So tickets may be lost,
doubled or late, and neither order nor number of jobs changes by it.

Workers issue them (`broker.ticket_issuer`), into a queue which all workers of the model consume.
Batch jobs may fill a part of a worker's slots only, and a ticket in that queue may go to one that
has no room for them. So each worker issues tickets for batch jobs to itself, as many as it has room
for, by a queue of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any
from uuid import uuid4

import kombu
import orjson
from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError

from broker.errors import BrokerUnavailableError
from config.settings import Queue as QueueSettings

#: The task of a ticket.
TASK = "forebay.run_ticket"
#: Wait for an answer of RabbitMQ (s).
TIMEOUT_S = 5.0
#: Of a queue: classic whatever the virtual host's default is (tickets are neither replicated nor
#: kept on a disk), and with a bound that it never reaches unless others put tickets in.
ARGUMENTS = {"x-queue-type": "classic", "x-max-length": 100_000}
#: Of a worker's own queue, which goes when nobody has consumed it for so long (ms).
OWN_ARGUMENTS = ARGUMENTS | {"x-expires": 60_000}

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


def own_queue_name(model: str, owner: str) -> str:
    """The one of a worker, for batch jobs; `owner` is `<hostname>:<pid>:<random>`."""
    return f"{queue_name(model)}.{owner.rpartition(':')[2]}"


def ticket_queues(model: str, owner: str | None) -> list[kombu.Queue]:
    """These queues as Celery consumes them, through the default exchange."""
    queues = {queue_name(model): ARGUMENTS}
    if owner is not None:
        queues[own_queue_name(model, owner)] = OWN_ARGUMENTS
    return [
        kombu.Queue(
            name, kombu.Exchange(""), routing_key=name, durable=True, queue_arguments=arguments
        )
        for name, arguments in queues.items()
    ]


class TicketOffice:
    """One model's queue in RabbitMQ, and a worker's own, on one connection. For one thread.

    Every method may raise `BrokerUnavailableError`; the next call then connects anew.
    """

    def __init__(self, settings: QueueSettings, model: str, owner: str) -> None:
        self._name = queue_name(model)
        self._own_name = own_queue_name(model, owner)
        self._url = settings.broker_url.get_secret_value()
        self._connection: Any = None
        self._channel: Any = None
        #: Tickets sent on this channel, and those of them without a confirmation yet.
        self._sent = 0
        self._unconfirmed: set[int] = set()
        self._refused = 0

    def waiting(self, *, own: bool = False) -> int:
        """Tickets that no worker has taken. Makes the queue where it is missing."""
        with self._connected():
            return self._declare(own)

    def issue(self, count: int, *, own: bool = False) -> int:
        """Put tickets in and wait until RabbitMQ has confirmed them; returns how many it took.

        They aren't kept on its disk: after a restart the next look makes them anew.
        """
        with self._connected():
            self._refused = 0
            for _ in range(count):
                self._publish(self._own_name if own else self._name)
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

    def _declare(self, own: bool) -> int:
        name, arguments = (self._own_name, OWN_ARGUMENTS) if own else (self._name, ARGUMENTS)
        reply = self._channel.queue_declare(
            name, durable=True, auto_delete=False, arguments=arguments
        )
        return int(reply.message_count)

    def _publish(self, name: str) -> None:
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
        self._channel.basic_publish(message, exchange="", routing_key=name)

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
