"""Who issues tickets: a thread of each worker, whenever there is something to claim.

The bell which the queue's scripts ring then (a new job, one given back, a tenant below its cap
again) wakes one of them; it counts what could be claimed, asks RabbitMQ how many tickets wait, and
issues the rest. Without a ring each looks twice a second, which takes back expired leases, lets
delayed jobs in, and makes up for tickets and rings that were lost.

One whose worker has no room for batch jobs passes those on by a bell of their own, and is woken
when one of its jobs has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import redis

from broker import keys
from broker.connections import translate
from broker.errors import BrokerError, BrokerUnavailableError
from broker.queue import JobQueue
from config.logs import get_logger

log = get_logger(__name__)

#: Tickets that wait in RabbitMQ are made up to this number: at a look every `PAUSE_S` enough for
#: 25,000 starts a second of a model.
MOST_WAITING = 256
#: The shortest time between two looks of a worker (s). Rings that come meanwhile are one.
PAUSE_S = 0.01
#: The longest (s). It is part of what a crash costs: until then nobody sees that a lease ran out.
LOOK_EVERY_S = 0.5
#: Wait before RabbitMQ or Redis is tried again (s).
RETRY_S = 0.5


class Office(Protocol):
    """`broker.tickets.TicketOffice`."""

    def waiting(self, *, own: bool = False) -> int: ...

    def issue(self, count: int, *, own: bool = False) -> int: ...

    def close(self) -> None: ...


class Worker(Protocol):
    """What `broker.leases.LeaseRegistry` tells of the worker."""

    queue: JobQueue
    queue_name: str
    owner: str

    def batch_room(self) -> int | None: ...

    def wait_for_room(self) -> bool: ...


class TicketIssuer:
    """The thread that issues a model's tickets.

    `issued` is told how many at each time. That RabbitMQ or Redis is away is logged once an outage.
    """

    def __init__(
        self,
        office: Office,
        client: redis.Redis,
        worker: Worker,
        issued: Callable[[int], object],
    ) -> None:
        self._office = office
        self._client = client
        self._worker = worker
        self._model = worker.queue_name
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
        room = self._worker.batch_room()
        found = self._worker.queue.count_claimable(self._model, MOST_WAITING, batch_room=room)
        return self._make_up(found.anywhere, own=False) + self._make_up(found.here, own=True)

    def _make_up(self, wanted: int, *, own: bool) -> int:
        missing = wanted - self._office.waiting(own=own) if wanted else 0
        if missing <= 0:
            return 0
        issued = self._office.issue(missing, own=own)
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
        other = keys.batch_bell(self._model)
        if self._worker.wait_for_room():
            other = keys.wake(self._model, self._worker.owner)
        try:
            self._client.brpop([keys.bell(self._model), other], timeout=LOOK_EVERY_S)
        except (redis.RedisError, OSError) as error:
            broken: BrokerError = translate(error)
            raise broken from error
