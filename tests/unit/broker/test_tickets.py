"""What is issued, and what happens when RabbitMQ isn't there."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from broker.errors import BrokerUnavailableError
from broker.jobs import Band, NewJob
from broker.memory import MemoryQueue
from broker.ticket_issuer import MOST_WAITING, TicketIssuer
from broker.tickets import TicketOffice, tls
from config.settings import Queue, SettingsError, load


class Office:
    """RabbitMQ, as far as an issuer sees it."""

    def __init__(self) -> None:
        self.tickets = 0
        #: For the worker itself.
        self.own = 0
        self.away = False
        self.asked = threading.Event()
        self.closed = False

    def waiting(self, *, own: bool = False) -> int:
        self.asked.set()
        if self.away:
            raise BrokerUnavailableError("RabbitMQ can't be reached: no")
        return self.own if own else self.tickets

    def issue(self, count: int, *, own: bool = False) -> int:
        if own:
            self.own += count
        else:
            self.tickets += count
        return count

    def close(self) -> None:
        self.closed = True


class Worker:
    """With room for so many batch jobs; any number is None."""

    queue_name, owner = "m", "host:1:abcd"

    def __init__(self, queue: MemoryQueue, room: int | None = None) -> None:
        self.queue: Any = queue
        self.room = room

    def batch_room(self) -> int | None:
        return self.room

    def wait_for_room(self) -> bool:
        return self.room == 0


class NoBell:
    """Redis without a ring."""

    def brpop(self, names: list[str], timeout: float) -> None:
        threading.Event().wait(0.001)


def put(queue: MemoryQueue, count: int, band: Band = Band.INTERACTIVE) -> None:
    for _ in range(count):
        queue.enqueue(NewJob(tenant="a", model="m", endpoint="/v1/x", body=b"{}", band=band))


def issuer(office: Any, queue: MemoryQueue, issued: list[int]) -> TicketIssuer:
    client: Any = NoBell()
    return TicketIssuer(office, client, Worker(queue), issued.append)


def test_what_is_missing_is_issued() -> None:
    office, queue, issued = Office(), MemoryQueue(Queue(default_max_in_flight=1000)), []
    mine = issuer(office, queue, issued)
    assert mine.look() == 0
    put(queue, 3)
    office.tickets = 1
    assert mine.look() == 2
    assert mine.look() == 0
    put(queue, MOST_WAITING)
    mine.look()
    assert office.tickets == MOST_WAITING
    assert issued == [2, MOST_WAITING - 3]


def test_batch_jobs_make_tickets_for_a_worker_with_room() -> None:
    office, queue = Office(), MemoryQueue(Queue())
    put(queue, 5, Band.BATCH)
    put(queue, 2)
    for room, tickets, own in ((0, 2, 0), (3, 2, 3), (9, 2, 5), (None, 7, 0)):
        office.tickets = office.own = 0
        client: Any = NoBell()
        TicketIssuer(office, client, Worker(queue, room), lambda _: None).look()
        assert (office.tickets, office.own) == (tickets, own)


@pytest.mark.parametrize(("room", "other"), [(0, "wake:host:1:abcd"), (1, "bell:batch")])
def test_without_room_it_waits_for_its_own_jobs_to_end(room: int, other: str) -> None:
    awaited: list[list[str]] = []

    class Bells(NoBell):
        def brpop(self, names: list[str], timeout: float) -> None:
            awaited.append(names)
            called.set()
            super().brpop(names, timeout)

    called = threading.Event()
    client: Any = Bells()
    worker = Worker(MemoryQueue(Queue()), room)
    mine = TicketIssuer(Office(), client, worker, lambda _: None)
    mine.start()
    assert called.wait(5)
    mine.stop()
    assert awaited[0] == ["fb:{m}:bell", f"fb:{{m}}:{other}"]


def test_an_outage_is_said_once_and_outlived() -> None:
    office, queue, issued = Office(), MemoryQueue(Queue()), []
    put(queue, 2)
    office.away = True
    mine = issuer(office, queue, issued)
    with capture_logs() as logs:
        mine.start()
        for _ in range(2):
            office.asked.clear()
            assert office.asked.wait(5)
        office.away = False
        office.asked.clear()
        assert office.asked.wait(5)
        mine.stop()
    assert office.tickets == 2
    assert office.closed
    assert [each["event"] for each in logs] == ["tickets_not_issued", "tickets_issued_again"]


def test_redis_away_is_an_outage_too() -> None:
    class Gone(NoBell):
        def brpop(self, names: list[str], timeout: float) -> None:
            called.set()
            raise redis.ConnectionError("gone")

    called = threading.Event()
    client: Any = Gone()
    office: Any = Office()
    mine = TicketIssuer(office, client, Worker(MemoryQueue(Queue())), lambda _: None)
    with capture_logs() as logs:
        mine.start()
        assert called.wait(5)
        mine.stop()
    assert "tickets_not_issued" in [each["event"] for each in logs]


def test_nobody_there_is_told_without_the_password() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"amqp://user:s3cret@127.0.0.1:{sock.getsockname()[1]}//"
        office = TicketOffice(Queue(broker_url=url), "m", "host:1:abcd")
        with pytest.raises(BrokerUnavailableError) as refused:
            office.waiting()
    assert "s3cret" not in str(refused.value)
    office.close()


def test_tls_is_for_amqps_alone() -> None:
    assert tls("amqp://host//") is False
    assert tls("amqps://host//")


def test_another_kind_of_broker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_QUEUE__BROKER_URL", "kafka://user:s3cret@host")
    with pytest.raises(SettingsError) as refused:
        load()
    text = str(refused.value)
    assert text.startswith("FOREBAY_QUEUE__BROKER_URL=(hidden): ")
    assert "amqps://" in text
    assert "s3cret" not in text
