"""What only Redis can show: lost scripts, lost ids, deleted records, servers in trouble."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from broker import keys
from broker.connections import SCHEMA_VERSION, check_server, connect, connect_async
from broker.errors import (
    BrokerUnavailableError,
    JobNotFoundError,
    QueueFullError,
    RateLimitedError,
    SchemaVersionError,
)
from broker.jobs import Accepted, Band, Delta, Ending, NewJob, Outcome, Status, Usage
from broker.limits import RateLimits
from broker.redis_queue import AsyncRedisQueue, RedisQueue
from broker.wire import decode_event
from config.settings import Redis as RedisSettings
from tests.conftest import free_port
from tests.contract.harness import MODEL, Harness, new_job, opened, policy, settings
from tests.contract.invariants import check

BASE = keys.base(MODEL)


@pytest.fixture
def desk(broker_url: str) -> Iterator[Harness]:
    with opened("redis", broker_url, settings()) as harness:
        yield harness
        assert harness.client is not None
        check(harness.client, MODEL)


def behind(desk: Harness) -> redis.Redis:
    assert desk.client is not None
    return desk.client


def test_scripts_that_the_server_forgot_are_sent_again(desk: Harness) -> None:
    desk.submit()
    behind(desk).script_flush()
    desk.submit()
    behind(desk).script_flush()
    desk.finish(desk.claim_one())
    assert desk.queue.stats(MODEL).depth == 1


async def test_many_async_calls_after_the_server_forgot_its_scripts(broker_url: str) -> None:
    client = connect_async(RedisSettings(url=broker_url, max_connections=3))
    queue = AsyncRedisQueue(client, settings())
    jobs = [new_job() for _ in range(300)]
    positions = await asyncio.gather(*map(queue.enqueue, jobs))
    assert sorted(each.position for each in positions) == list(range(300))
    await client.script_flush()
    read = await asyncio.gather(*(queue.get(job.id) for job in jobs), queue.stats(MODEL))
    assert [job.id for job in read[:-1]] == [job.id for job in jobs]
    await client.aclose()


async def test_one_bad_call_does_not_touch_the_others_of_its_batch(broker_url: str) -> None:
    client = connect_async(RedisSettings(url=broker_url))
    queue = AsyncRedisQueue(client, settings(default_max_queued=2))
    answers = await asyncio.gather(
        *(queue.enqueue(new_job("a")) for _ in range(4)),
        queue.get("job_none"),
        queue.enqueue(new_job("b")),
        return_exceptions=True,
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [Accepted, Accepted, QueueFullError, QueueFullError, JobNotFoundError, Accepted]
    await client.aclose()


async def test_a_caller_that_gives_up_leaves_the_others_their_answers(broker_url: str) -> None:
    client = connect_async(RedisSettings(url=broker_url))
    queue = AsyncRedisQueue(client, settings())
    jobs = [new_job() for _ in range(20)]
    tasks = [asyncio.create_task(queue.enqueue(job)) for job in jobs]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    assert all(isinstance(answer, Accepted) for answer in answers[1::2])
    await client.aclose()


def test_threads_share_a_queue(desk: Harness) -> None:
    def work() -> None:
        for _ in range(50):
            desk.submit()
            for claim in desk.claim():
                done.append(desk.finish(claim))

    done: list[bool] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for claim in desk.claim(200):
        done.append(desk.finish(claim))
    assert done == [True] * 200


def test_a_limit_holds_exactly_however_many_processes_submit(
    desk: Harness, broker_url: str
) -> None:
    def submit() -> None:
        client = connect(RedisSettings(url=broker_url))
        queue = RedisQueue(client, settings())
        for _ in range(40):
            try:
                queue.enqueue(new_job("a", limits=limits))
            except RateLimitedError:
                refused.append(1)
        client.close()

    limits = RateLimits(requests_per_minute=50, tokens_per_minute=1_000_000)
    refused: list[int] = []
    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # One is paid off every 1.2 s.
    assert 50 <= desk.queue.stats(MODEL).depth <= 52
    assert len(refused) == 160 - desk.queue.stats(MODEL).depth


def test_limits_leave_nothing_behind(desk: Harness) -> None:
    limits = RateLimits(requests_per_minute=50, tokens_per_minute=1_000_000)
    desk.submit(limits=limits, key_id="k", key_limits=limits)
    for key in (keys.limits("t", "acme"), keys.limits("k", "k")):
        assert 0 < behind(desk).pttl(key) < 62_000
    desk.finish(desk.claim_one())
    desk.advance(120_000)
    for key in (keys.limits("t", "acme"), keys.limits("k", "k")):
        assert not behind(desk).exists(key)


def test_jobs_at_once_hold_exactly_however_many_processes_submit(
    desk: Harness, broker_url: str
) -> None:
    def submit() -> None:
        client = connect(RedisSettings(url=broker_url))
        queue = RedisQueue(client, settings())
        for _ in range(10):
            try:
                accepted.append(queue.enqueue(new_job("a", key_id="k", key_limits=limits)))
            except RateLimitedError:
                refused.append(1)
        client.close()

    limits = RateLimits(max_jobs=7)
    accepted: list[Accepted] = []
    refused: list[int] = []
    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(accepted), len(refused)) == (7, 33)
    for claim in desk.claim(7):
        desk.finish(claim)
    assert not behind(desk).exists(keys.key_jobs("k"))


def test_places_of_lost_records_are_found_again(desk: Harness) -> None:
    """A record that somebody deleted, and a job that a version without such bounds has ended."""
    limits = RateLimits(max_jobs=3)
    ids = [desk.submit(key_id="k", key_limits=limits) for _ in range(3)]
    client = behind(desk)
    with pytest.raises(RateLimitedError):
        desk.submit(key_id="k", key_limits=limits)
    client.delete(keys.job(ids[0]))
    desk.queue.cancel(ids[1])
    client.sadd(keys.key_jobs("k"), ids[1])
    for _ in range(2):
        desk.submit(key_id="k", key_limits=limits)
    with pytest.raises(RateLimitedError):
        desk.submit(key_id="k", key_limits=limits)
    held = {raw.decode() for raw in client.smembers(keys.key_jobs("k"))}
    assert ids[2] in held
    assert len(held) == 3


def test_keys_without_a_bound_of_jobs_have_no_set(desk: Harness) -> None:
    desk.submit(key_id="k", key_limits=RateLimits(requests_per_minute=9))
    assert not behind(desk).exists(keys.key_jobs("k"))


def test_the_claim_command_sent_by_hand(desk: Harness) -> None:
    assert isinstance(desk.queue, RedisQueue)
    job_id = desk.submit()
    desk.queue.load_scripts()
    command = desk.queue.claim_command(MODEL, "w1", 4)
    reply = behind(desk).execute_command(*command)
    (claim,) = desk.queue.decode_claims(MODEL, reply)
    assert (claim.job.id, claim.attempt) == (job_id, 1)
    assert claim.job == desk.queue.get(job_id)
    assert not desk.queue.more_waits(reply)


@pytest.mark.parametrize(("stream", "length", "told"), [(0, 10, 1), (1, 10, 0), (0, 20_000, 0)])
def test_the_last_message_brings_a_small_output_along(
    desk: Harness, stream: int, length: int, told: int
) -> None:
    job_id = desk.submit(stream=bool(stream))
    (claim,) = desk.queue.claim(MODEL, "w1")
    output = b'"%b"' % ("\u00e9" * (length // 2)).encode()
    with behind(desk).pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(keys.channel(job_id))
        channel.get_message(timeout=5)
        desk.queue.complete(claim, Outcome(status=Status.COMPLETED, output=output))
        message: Any = channel.get_message(timeout=5)
    ending = decode_event(message["data"]).ending
    record = desk.queue.get(job_id)
    if told:
        assert ending == Ending(
            created_ms=record.created_ms,
            started_ms=record.started_ms,
            finished_ms=record.finished_ms,
            output=output,
        )
    else:
        assert ending is None
    # The log says the same in either case, without it.
    events, _ = desk.queue.events(job_id)
    assert (events[-1], events[-1].ending) == (decode_event(message["data"]), None)
    assert record.output == output


def test_a_claim_tells_when_it_has_left_work_behind(desk: Harness) -> None:
    assert isinstance(desk.queue, RedisQueue)
    first, second = desk.submit(), desk.submit()
    desk.queue.load_scripts()
    for expected, more in ((first, True), (second, False)):
        command = desk.queue.claim_command(MODEL, "w1", 1)
        reply = behind(desk).execute_command(*command)
        (claim,) = desk.queue.decode_claims(MODEL, reply)
        assert (claim.job.id, desk.queue.more_waits(reply)) == (expected, more)


def test_a_sweep_finds_ids_that_are_nowhere(desk: Harness) -> None:
    first, second, third = desk.submit(), desk.submit(), desk.submit()
    desk.claim_one()
    client = behind(desk)
    client.zrem(BASE + "l", first)
    client.hdel(BASE + "lo", first)
    client.hdel(BASE + "if", "acme")
    assert desk.queue.sweep(MODEL) == 1
    assert desk.status(first) is Status.QUEUED
    check(client, MODEL)
    assert [claim.job.id for claim in desk.claim(9)] == [first, second, third]


def test_a_sweep_mends_a_lost_bell(desk: Harness) -> None:
    desk.submit()
    behind(desk).delete(keys.bell(MODEL))
    desk.queue.sweep(MODEL)
    assert behind(desk).llen(keys.bell(MODEL)) == 1


def test_the_bell_rings_for_work_and_only_once(desk: Harness) -> None:
    client = behind(desk)
    for _ in range(3):
        desk.submit()
    assert client.lrange(keys.bell(MODEL), 0, -1) == [b"1"]
    client.delete(keys.bell(MODEL))
    desk.claim(2)
    assert client.llen(keys.bell(MODEL)) == 1, "work was left behind"
    client.delete(keys.bell(MODEL))
    (last,) = desk.claim(2)
    assert client.llen(keys.bell(MODEL)) == 0
    desk.queue.requeue(last)
    assert client.llen(keys.bell(MODEL)) == 1


def test_an_enqueue_wakes_a_blocked_worker(desk: Harness, broker_url: str) -> None:
    heard: list[list[object]] = []

    def wait() -> None:
        with redis.Redis.from_url(broker_url) as client:
            heard.append(list(client.brpop([keys.bell(MODEL)], timeout=20)))

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not behind(desk).info("clients")["blocked_clients"]:
        assert waiter.is_alive()
    desk.submit()
    waiter.join(20)
    assert heard == [[keys.bell(MODEL).encode(), b"1"]]
    behind(desk).rpush(keys.bell(MODEL), "1")


@pytest.mark.parametrize("state", ["waiting", "delayed", "running"])
def test_a_record_deleted_from_outside_harms_nobody(desk: Harness, state: str) -> None:
    gone = desk.submit(delay_ms=1_000 if state == "delayed" else 0)
    other = desk.submit("b")
    if state == "running":
        (claim, _) = desk.claim(2)
        assert claim.job.id == gone
    behind(desk).delete(keys.job(gone), keys.events(gone))
    if state == "running":
        assert not desk.finish(claim)
        assert not desk.queue.requeue(claim)
    desk.advance(11_000)
    assert [claim.job.id for claim in desk.claim(9)] == [other]
    check(behind(desk), MODEL)
    stats = desk.queue.stats(MODEL)
    assert [row.tenant for row in stats.top_tenants] == ["b"]


def test_a_tenants_index_forgets_what_has_expired(desk: Harness) -> None:
    client = behind(desk)
    for n in range(60):
        client.zadd(keys.tenant_jobs("acme"), {f"job_gone_{n}": 1_700_000_000_000 + n})
    kept = [desk.submit() for _ in range(200)]
    for job_id in kept:
        desk.queue.cancel(job_id)
    deadline = time.monotonic() + 30
    while client.zcount(keys.tenant_jobs("acme"), 0, 1_700_000_001_000):
        assert time.monotonic() < deadline
        kept.append(desk.submit())
        desk.queue.cancel(kept[-1])
    assert client.zcard(keys.tenant_jobs("acme")) == len(kept)
    assert client.ttl(keys.tenant_jobs("acme")) > 0


def test_waiting_jobs_take_no_event_log(desk: Harness) -> None:
    job_id = desk.submit()
    assert behind(desk).exists(keys.events(job_id)) == 0


def test_idle_tenants_are_forgotten_once_the_clock_has_passed_them(desk: Harness) -> None:
    for n in range(50):
        desk.submit(f"t{n}", cost=10)
    for claim in desk.claim(50):
        desk.finish(claim)
    for _ in range(60):
        desk.submit("busy", cost=1_000)
        desk.finish(desk.claim_one())
    assert behind(desk).zcard(BASE + "i:interactive") <= 2
    for part in ("n", "if", "t", "j", "l", "lo"):
        assert behind(desk).exists(BASE + part) == 0


# -- servers in trouble ---------------------------------------------------------------------------
def test_nobody_answers() -> None:
    client = connect(RedisSettings(url=f"redis://127.0.0.1:{free_port()}/0", timeout_s=0.5))
    queue = RedisQueue(client, settings())
    for call in (queue.ping, lambda: queue.enqueue(new_job()), lambda: check_server(client)):
        with pytest.raises(BrokerUnavailableError, match="can't be reached"):
            call()


async def test_nobody_answers_an_async_client() -> None:
    client = connect_async(RedisSettings(url=f"redis://127.0.0.1:{free_port()}/0", timeout_s=0.5))
    queue = AsyncRedisQueue(client, settings())
    answers = await asyncio.gather(*(queue.ping() for _ in range(9)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {BrokerUnavailableError}
    await client.aclose()


def test_a_server_that_hangs(desk: Harness, broker_url: str) -> None:
    client = connect(RedisSettings(url=broker_url, timeout_s=0.2))
    queue = RedisQueue(client, settings())
    queue.ping()
    behind(desk).execute_command("CLIENT", "PAUSE", 30_000, "WRITE")
    with pytest.raises(BrokerUnavailableError, match="did not answer in time"):
        queue.enqueue(new_job())
    behind(desk).execute_command("CLIENT", "UNPAUSE")
    client.close()


def test_out_of_memory_refuses_new_jobs_and_lets_running_ones_end(desk: Harness) -> None:
    running, waiting = desk.submit(), desk.submit("b")
    claim = desk.claim_one()
    client = behind(desk)
    refused: NewJob = new_job()
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(BrokerUnavailableError, match="out of memory"):
            desk.queue.enqueue(refused)
        assert desk.queue.renew(MODEL, "w1", [(running, 1)]) == {running: "ok"}
        # Its text goes out before a streaming job ends, so this is part of ending.
        assert desk.queue.emit(MODEL, [Delta(job_id=running, attempt=1, text="so")]) == []
        assert desk.finish(claim)
        assert desk.claim_one().job.id == waiting
        assert desk.queue.cancel(waiting) == "cancelling"
        assert desk.queue.stats(MODEL).in_flight == 1
    finally:
        client.config_set("maxmemory", 0)
    with pytest.raises(JobNotFoundError):
        desk.queue.get(refused.id)
    assert desk.status(running) is Status.COMPLETED


def test_a_replica_is_refused(desk: Harness) -> None:
    client = behind(desk)
    client.replicaof("127.0.0.1", free_port())
    try:
        with pytest.raises(BrokerUnavailableError, match="read-only"):
            desk.submit()
        with pytest.raises(Exception, match="replica"):
            check_server(client)
    finally:
        client.replicaof("NO", "ONE")


def test_a_fit_server_passes_and_an_evicting_one_is_warned_of(desk: Harness) -> None:
    client = behind(desk)
    with capture_logs() as lines:
        check_server(client)
        client.config_set("maxmemory-policy", "allkeys-lru")
        check_server(client)
        client.config_set("maxmemory-policy", "noeviction")
    assert [line["event"] for line in lines] == ["redis_may_evict_jobs"]


def test_a_server_with_data_of_another_major_version_is_refused(desk: Harness) -> None:
    client = behind(desk)
    check_server(client)
    assert client.get(keys.SCHEMA) == SCHEMA_VERSION.encode()
    client.set(keys.SCHEMA, "7.1")
    with pytest.raises(SchemaVersionError, match=r"has schema version 7\.1"):
        check_server(client)


def test_a_paused_queue_does_not_keep_workers_awake(desk: Harness) -> None:
    desk.queue.pause(MODEL)
    desk.submit()
    bell = keys.bell(MODEL)
    behind(desk).delete(bell)
    assert desk.claim() == []
    desk.queue.sweep(MODEL)
    assert behind(desk).llen(bell) == 0
    desk.queue.resume(MODEL)
    assert behind(desk).llen(bell) == 1


def test_a_connection_that_broke_is_replaced_and_the_call_repeated(
    desk: Harness, broker_url: str
) -> None:
    client = connect(RedisSettings(url=broker_url))
    queue = RedisQueue(client, settings())
    queue.ping()
    behind(desk).client_kill_filter(_type="normal", skipme=True)
    assert queue.enqueue(new_job()).position == 0
    client.close()


def test_a_repeat_of_our_own_is_no_duplicate(
    desk: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server did it, and the answer was lost."""
    assert isinstance(desk.queue, RedisQueue)
    send = desk.queue._send
    losses = iter([True])

    def lossy(commands: object) -> list[object]:
        replies = send(commands)  # type: ignore[arg-type]
        if next(losses, False):
            raise redis.ConnectionError("lost")
        return replies

    desk.submit()
    monkeypatch.setattr(desk.queue, "_send", lossy)
    assert desk.queue.enqueue(new_job()).position == 1
    assert desk.queue.stats(MODEL).depth == 2


@pytest.mark.parametrize("failure", [redis.ConnectionError("lost"), redis.TimeoutError("late")])
def test_the_job_is_found_after_a_crash_between_accept_and_answer(
    desk: Harness, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """The server took the job; no answer came, on this connection or on the next."""
    assert isinstance(desk.queue, RedisQueue)
    first, again = new_job(idempotency_key="k"), new_job(idempotency_key="k")
    send = desk.queue._send

    def cut(commands: object) -> None:
        send(commands)  # type: ignore[arg-type]
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(desk.queue, "_send", cut)
        with pytest.raises(BrokerUnavailableError):
            desk.queue.enqueue(first)
    found = desk.queue.enqueue(again)
    assert (found.job_id, found.replayed) == (first.id, True)
    assert desk.queue.stats(MODEL).depth == 1


def test_a_cap_published_for_all_is_seen_by_the_sweep(desk: Harness) -> None:
    desk.queue.set_policy("*", policy(max_in_flight=1))
    for _ in range(3):
        desk.submit()
    assert len(desk.claim(9)) == 1
    desk.queue.set_policy("*", policy(max_in_flight=2))
    desk.queue.sweep(MODEL)
    assert len(desk.claim(9)) == 1


def test_large_bodies_and_outputs(desk: Harness) -> None:
    body = bytes(range(256)) * 4_096 * 4
    job_id = desk.submit(body=body, band=Band.BATCH)
    claim = desk.claim_one()
    assert claim.job.body == body
    outcome = Outcome(status=Status.COMPLETED, output=body, usage=Usage(output_tokens=1))
    assert desk.queue.complete(claim, outcome)
    assert desk.queue.get(job_id).output == body


def test_a_sweep_forgets_rates_of_tenants_long_gone(desk: Harness) -> None:
    for tenant in ("gone", "here"):
        desk.submit(tenant)
        claim = desk.claim_one()
        desk.advance(1_000)  # it runs for longer than it waited, however slow the machine is
        desk.finish(claim)
        desk.advance(3_500_000 if tenant == "gone" else 200_000)
    desk.queue.sweep(MODEL)
    fields = behind(desk).hkeys(BASE + "s")
    assert {b"d", b"d:here", b"w:here"} <= set(fields)
    assert not {b"d:gone", b"w:gone"} & set(fields)
