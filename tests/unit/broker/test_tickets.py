"""What is issued, and what happens when RabbitMQ isn't there."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from broker.errors import BrokerUnavailableError
from broker.jobs import NewJob
from broker.memory import MemoryQueue
from broker.tickets import MOST_WAITING, TicketIssuer, TicketOffice, tls
from config.settings import Queue, SettingsError, load


class Office:
    """RabbitMQ, as far as an issuer sees it."""

    def __init__(self) -> None:
        self.tickets = 0
        self.away = False
        self.asked = threading.Event()
        self.closed = False

    def waiting(self) -> int:
        self.asked.set()
        if self.away:
            raise BrokerUnavailableError("RabbitMQ can't be reached: no")
        return self.tickets

    def issue(self, count: int) -> int:
        self.tickets += count
        return count

    def close(self) -> None:
        self.closed = True


class NoBell:
    """Redis without a ring."""

    def brpop(self, names: list[str], timeout: float) -> None:
        threading.Event().wait(0.001)


def put(queue: MemoryQueue, count: int) -> None:
    for _ in range(count):
        queue.enqueue(NewJob(tenant="a", model="m", endpoint="/v1/x", body=b"{}"))


def issuer(office: Any, queue: MemoryQueue, issued: list[int]) -> TicketIssuer:
    client: Any = NoBell()
    return TicketIssuer(office, client, queue, "m", issued.append)


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
    mine = TicketIssuer(office, client, MemoryQueue(Queue()), "m", lambda _: None)
    with capture_logs() as logs:
        mine.start()
        assert called.wait(5)
        mine.stop()
    assert "tickets_not_issued" in [each["event"] for each in logs]


def test_nobody_there_is_told_without_the_password() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"amqp://user:s3cret@127.0.0.1:{sock.getsockname()[1]}//"
        office = TicketOffice(Queue(broker_url=url), "m")
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
