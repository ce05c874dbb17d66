"""The transport in one process: kombu's channel on a real Redis, without Celery around it.

These tests also hold kombu to what the transport overrides of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
from kombu import transport
from kombu.transport import redis as stock
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker import keys, leases
from broker.app import broker_url, configuration, make_app, use_transport
from broker.connections import connect
from broker.errors import BrokerError
from broker.jobs import Band, Claim, NewJob, Outcome, Status
from broker.redis_queue import RedisQueue
from broker.stats import WorkerStatus
from broker.transport import Channel, NotForMessagesError, Transport
from config.settings import Queue, Redis, Settings

OWNER = "host:1:a"


class Consumer:
    """A process that holds leases of queue `tiny` and gets its messages."""

    def __init__(self, url: str, *, credit: int = 8) -> None:
        use_transport()
        self.client = connect(Redis(url=SecretStr(url)))
        self.client.config_resetstat()
        self.queue = RedisQueue(self.client, Queue())
        self.healthy = True
        self.batch_slots = credit
        self.registry = leases.LeaseRegistry(
            self.queue,
            queue_name="tiny",
            owner=OWNER,
            ttl_s=60,
            renew_every_s=60,
            status=lambda: WorkerStatus(
                owner=OWNER,
                queue="tiny",
                hostname="host",
                pid=1,
                engine="simulated",
                state="ready",
                capacity=credit,
                jobs=0,
                steps=0,
                started_ms=0,
                seen_ms=0,
            ),
            healthy=lambda: self.healthy,
            batch_slots=lambda: self.batch_slots,
        )
        leases.install(self.registry)
        self.registry.start()
        self.connection = kombu.Connection(
            url, transport_options={"model_queues": ["tiny", "other"], "claim_batch": 4}
        )
        self.channel = self.connection.channel()
        self.messages: list[Any] = []
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue("tiny")],
            on_message=self.messages.append,
            prefetch_count=credit,
        )

    def put(self, count: int = 1, band: Band = Band.STANDARD) -> list[str]:
        jobs = [
            NewJob(tenant="acme", model="tiny", endpoint="/v1/test", body=b"{}", band=band)
            for _ in range(count)
        ]
        for job in jobs:
            self.queue.enqueue(job)
        return [job.id for job in jobs]

    def turn(self, until: Callable[[], bool], turns: int = 300) -> None:
        """Let kombu's poller work until the condition holds."""
        for _ in range(turns):
            if until():
                return
            try:
                self.connection.drain_events(timeout=0.1)
            except TimeoutError:
                continue
        assert until()

    def settle(self, message: Any) -> None:
        """What the task and Celery do at the end of a job."""
        lease = self.registry.start_job(message.headers["id"])
        assert self.queue.complete(lease.claim, Outcome(status=Status.COMPLETED, output=b"{}"))
        self.registry.settle(lease)
        message.ack()

    def close(self) -> None:
        self.connection.release()
        self.registry.stop()
        leases.install(None)
        self.client.connection_pool.disconnect()


@pytest.fixture
def consumer(broker_url: str) -> Iterator[Consumer]:
    consumer = Consumer(broker_url)
    yield consumer
    consumer.close()


def waits(consumer: Consumer) -> bool:
    """Whether it is waiting for the bell."""
    return bool(consumer.client.info("clients")["blocked_clients"])


def test_alias_leads_to_our_transport() -> None:
    use_transport()
    for scheme in ("redis", "rediss"):
        assert transport.get_transport_cls(scheme) is Transport
    assert Transport.driver_type == "redis"


def test_kombu_has_what_is_overridden() -> None:
    for name in (
        "_basic_cancel", "_brpop_read", "_brpop_start", "_connparams", "_delete",
        "_flush_brpop_reauth", "_get", "_has_queue", "_purge", "_put", "basic_consume", "close",
    ):  # fmt: skip
        assert name in vars(stock.Channel), name
    assert isinstance(stock.MultiChannelPoller.fds, property)
    assert stock.Channel._in_poll is False
    assert stock.Channel._brpop_sent_at is None


def test_claimed_job_becomes_a_message(consumer: Consumer) -> None:
    consumer.consumer.consume()
    (job_id,) = consumer.put()
    consumer.turn(lambda: len(consumer.messages) == 1)
    (message,) = consumer.messages
    assert message.delivery_tag == f"{job_id}:1"
    assert message.headers["task"] == "forebay.run_job"
    assert message.headers["id"] == message.headers["root_id"] == job_id
    assert message.payload[:2] == ([job_id], {})
    assert message.delivery_info["routing_key"] == "tiny"
    assert consumer.registry.held == 1
    assert consumer.queue.get(job_id).status is Status.IN_PROGRESS
    consumer.settle(message)
    assert consumer.registry.held == 0
    assert consumer.queue.get(job_id).status is Status.COMPLETED


def test_no_more_is_claimed_than_there_are_free_slots(consumer: Consumer) -> None:
    consumer.consumer.consume()
    ids = consumer.put(20)
    consumer.turn(lambda: len(consumer.messages) == 8)
    with pytest.raises(socket.timeout):
        consumer.connection.drain_events(timeout=0.2)
    assert consumer.queue.stats("tiny").in_flight == 8
    for message in list(consumer.messages):
        consumer.settle(message)
    consumer.turn(lambda: len(consumer.messages) == 16)
    assert [m.headers["id"] for m in consumer.messages] == ids[:16]


def test_claims_grow_with_the_work(consumer: Consumer) -> None:
    asked: list[int] = []
    claim_command = consumer.queue.claim_command

    def spy(queue: str, owner: str, limit: int, room: int | None) -> Any:
        asked.append(limit)
        return claim_command(queue, owner, limit, room)

    consumer.queue.claim_command = spy  # type: ignore[method-assign]
    consumer.put(7)
    consumer.consumer.consume()
    consumer.turn(lambda: len(consumer.messages) == 7)
    # The last claim has left nothing behind: nobody asks for more until the bell rings.
    assert asked == [1, 2, 4]
    asked.clear()
    consumer.settle(consumer.messages[0])
    consumer.put()
    consumer.turn(lambda: len(consumer.messages) == 8)
    assert set(asked) == {1}


def test_unhealthy_process_claims_nothing_until_it_recovers(consumer: Consumer) -> None:
    consumer.healthy = False
    consumer.consumer.consume()
    consumer.put()
    with pytest.raises(socket.timeout):
        consumer.connection.drain_events(timeout=0.3)
    consumer.healthy = True
    consumer.turn(lambda: len(consumer.messages) == 1)


def test_lost_bell_is_healed_within_a_second(consumer: Consumer) -> None:
    consumer.consumer.consume()
    consumer.turn(lambda: waits(consumer))
    consumer.put()
    consumer.client.delete(keys.bell("tiny"))
    consumer.turn(lambda: len(consumer.messages) == 1)


def test_batch_jobs_leave_slots_free(consumer: Consumer) -> None:
    consumer.batch_slots = 2
    batch = consumer.put(5, Band.BATCH)
    consumer.consumer.consume()
    consumer.turn(lambda: consumer.client.llen(keys.batch_bell("tiny")) == 1)
    assert [message.headers["id"] for message in consumer.messages] == batch[:2]
    consumer.turn(lambda: waits(consumer))
    (urgent,) = consumer.put(1, Band.INTERACTIVE)
    consumer.turn(lambda: len(consumer.messages) == 3)
    assert consumer.messages[2].headers["id"] == urgent


def test_the_end_of_a_batch_job_wakes_a_worker_without_room(consumer: Consumer) -> None:
    rooms: list[int | None] = []
    claim_command = consumer.queue.claim_command

    def spy(queue: str, owner: str, limit: int, room: int | None) -> Any:
        rooms.append(room)
        return claim_command(queue, owner, limit, room)

    consumer.queue.claim_command = spy  # type: ignore[method-assign]
    consumer.batch_slots = 2
    consumer.put(3, Band.BATCH)
    channel: Channel = consumer.channel
    channel.brpop_timeout = 60
    consumer.consumer.consume()
    consumer.turn(lambda: rooms[-1:] == [0] and not channel._asked and bool(channel._in_poll))
    consumer.settle(consumer.messages[0])
    # Without the wake-up this would be as long as the wait for the bell.
    consumer.turn(lambda: len(consumer.messages) == 3)
    assert rooms[-1] == 1
    assert not consumer.client.exists(keys.wake("tiny", OWNER))


def test_a_worker_with_room_hears_of_batch_work_that_another_has_no_room_for(
    consumer: Consumer,
) -> None:
    consumer.channel.brpop_timeout = 60
    consumer.consumer.consume()
    consumer.turn(lambda: waits(consumer))
    (job_id,) = consumer.put(1, Band.BATCH)
    consumer.client.delete(keys.bell("tiny"))
    assert consumer.queue.claim("tiny", "other", batch_room=0) == []
    consumer.turn(lambda: len(consumer.messages) == 1)
    assert consumer.messages[0].headers["id"] == job_id


def test_rejected_message_gives_its_job_back(consumer: Consumer) -> None:
    consumer.consumer.consume()
    (job_id,) = consumer.put()
    consumer.turn(lambda: len(consumer.messages) == 1)
    consumer.messages[0].reject(requeue=True)
    consumer.turn(lambda: len(consumer.messages) == 2)
    assert consumer.messages[1].delivery_tag == f"{job_id}:2"


def test_consumer_that_fails_to_take_a_message_loses_no_job(consumer: Consumer) -> None:
    def fail(_: Any) -> None:
        raise ValueError("no")

    consumer.consumer.on_message = fail
    consumer.consumer.consume()
    consumer.put(3)
    with pytest.raises(ValueError, match="no"):
        consumer.turn(lambda: False)
    consumer.consumer.on_message = consumer.messages.append
    consumer.turn(lambda: len(consumer.messages) == 3)
    assert consumer.registry.held == 3


def test_closing_the_channel_keeps_the_leases(consumer: Consumer) -> None:
    """A reconnect: jobs go on, nothing is delivered twice."""
    consumer.consumer.consume()
    ids = consumer.put(3)
    consumer.turn(lambda: len(consumer.messages) == 3)
    consumer.channel.close()
    assert consumer.registry.held == 3
    for message in consumer.messages:
        consumer.settle(message)
    assert all(consumer.queue.get(job_id).status is Status.COMPLETED for job_id in ids)


def test_claim_under_way_is_handed_back_when_consuming_ends(consumer: Consumer) -> None:
    consumer.put()
    consumer.consumer.consume()
    channel: Channel = consumer.channel
    consumer.connection.transport.cycle.on_poll_start()  # sends the claim
    assert channel._asked == 1
    consumer.registry.draining = True
    consumer.consumer.cancel()
    assert consumer.messages == []
    consumer.registry.stop()
    stats = consumer.queue.stats("tiny")
    assert (stats.depth, stats.in_flight) == (1, 0)


def test_unknown_script_is_loaded_and_asked_again(consumer: Consumer) -> None:
    consumer.put()
    consumer.client.script_flush()
    consumer.consumer.consume()
    consumer.turn(lambda: len(consumer.messages) == 1)


def test_refusal_is_logged_once_and_waited_out(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.transport_channel.REFUSED_PAUSE_S", 0.0)
    claim_command = consumer.queue.claim_command
    left = 3

    def refused(queue: str, owner: str, limit: int, room: int | None) -> Any:
        nonlocal left
        left -= 1
        return claim_command(queue, owner, limit, room) if left < 0 else ["EVALSHA", "x"]

    consumer.queue.claim_command = refused  # type: ignore[method-assign]
    consumer.put()
    consumer.consumer.consume()
    with capture_logs() as logs:
        consumer.turn(lambda: len(consumer.messages) == 1)
    assert [line["event"] for line in logs].count("command_refused") == 1


def test_unreadable_claim_is_survived(consumer: Consumer) -> None:
    decode = consumer.queue.decode_claims
    replies: list[Any] = []

    def broken_once(queue: str, reply: Any) -> list[Claim]:
        replies.append(reply)
        if len(replies) == 1:
            raise KeyError("band")
        return decode(queue, reply)

    consumer.queue.decode_claims = broken_once  # type: ignore[method-assign]
    ids = consumer.put(2)
    consumer.consumer.consume()
    with capture_logs() as logs:
        consumer.turn(lambda: len(consumer.messages) == 1)
    assert "claims_unreadable" in [line["event"] for line in logs]
    assert consumer.messages[0].headers["id"] == ids[1]


def test_other_queues_go_kombus_own_way(consumer: Consumer) -> None:
    consumer.consumer.consume()
    got: list[Any] = []
    plain = kombu.Queue("plain", kombu.Exchange("plain"), routing_key="plain")
    both = kombu.Consumer(
        consumer.channel, [plain], callbacks=[lambda body, message: got.append((body, message))]
    )
    both.consume()
    consumer.put()
    with kombu.Connection(consumer.connection.as_uri(include_password=True)) as publisher:
        publisher.Producer().publish(
            {"n": 1}, exchange="plain", routing_key="plain", declare=[plain]
        )
    consumer.turn(lambda: len(got) == 1 and len(consumer.messages) == 1)
    body, message = got[0]
    assert body == {"n": 1}
    message.ack()
    assert consumer.client.hlen("unacked") == 0


def test_queue_tells_its_true_depth_and_takes_no_messages(consumer: Consumer) -> None:
    consumer.put(3)
    queue = kombu.Queue("tiny", channel=consumer.channel)
    assert queue.queue_declare(passive=True).message_count == 3
    with pytest.raises(NotForMessagesError):
        consumer.connection.Producer().publish({}, exchange="", routing_key="tiny")
    with pytest.raises(NotForMessagesError):
        queue.purge()
    with pytest.raises(NotForMessagesError):
        queue.get()
    queue.delete()
    assert consumer.queue.stats("tiny").depth == 3


def test_process_consumes_only_the_queue_it_leases(consumer: Consumer) -> None:
    with pytest.raises(BrokerError, match="other"):
        kombu.Consumer(consumer.channel, [kombu.Queue("other")]).consume()
    with pytest.raises(BrokerError, match="tiny"):
        kombu.Consumer(consumer.channel, [kombu.Queue("tiny")], no_ack=True).consume()
    leases.install(None)
    with pytest.raises(RuntimeError, match="no lease registry"):
        kombu.Consumer(consumer.channel, [kombu.Queue("tiny")]).consume()


@pytest.mark.parametrize(
    ("url", "spelled"),
    [
        ("redis://:pw@host:1/2", "redis://:pw@host:1/2"),
        ("rediss://host/0", "rediss://host/0"),
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock"),
        ("unix:///run/redis.sock?db=3", "redis+socket:///run/redis.sock?virtual_host=3"),
        ("unix://:p%40w@/run/redis.sock", "redis+socket://:p%40w@/run/redis.sock"),
        ("unix:///run/redis.sock?password=p%40w", "redis+socket://:p%40w@/run/redis.sock"),
    ],
)
def test_urls_are_spelled_kombus_way(url: str, spelled: str) -> None:
    assert broker_url(url) == spelled


def test_tls_is_verified_unless_the_url_says_otherwise() -> None:
    def use_ssl(url: str) -> Any:
        return configuration(Settings(redis={"url": url}), frozenset())["broker_use_ssl"]

    assert use_ssl("rediss://host/0") == {"ssl_cert_reqs": 2}
    assert use_ssl("rediss://host/0?ssl_cert_reqs=none") is None
    assert use_ssl("redis://host/0") is None


def test_app_does_without_results_and_keeps_late_acknowledgement() -> None:
    app = make_app(Settings(), model_queues=["tiny"])
    conf = app.conf
    assert (conf.task_acks_late, conf.worker_prefetch_multiplier) == (True, 1)
    assert (conf.task_ignore_result, conf.accept_content) == (True, ["json"])
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert set(app.amqp.queues) == {"tiny"}
    app.close()
