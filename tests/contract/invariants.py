"""What must hold in Redis after every script, whatever happened before."""

from __future__ import annotations

from collections import Counter

import orjson
import redis

from broker.jobs import BANDS, TERMINAL, Band, EventType, Status


def check(client: redis.Redis, queue: str) -> None:
    """Assert every invariant of a queue's keys and of its job records."""
    base = f"fb:{{{queue}}}:"
    jobs = {key.decode(): value.decode() for key, value in client.hgetall(base + "j").items()}
    leases = {key.decode() for key in client.zrange(base + "l", 0, -1)}
    delayed = {key.decode() for key in client.zrange(base + "d", 0, -1)}
    parked = _names(client.smembers(base + "park"))
    cancel = _names(client.smembers(base + "x"))
    waiting: Counter[str] = Counter()
    running: Counter[str] = Counter()
    queued: set[str] = set()
    eligible = urgent = False

    for band in BANDS:
        lists: dict[str, list[str]] = {}
        prefix = f"{base}q:{band}:"
        for key in client.scan_iter(prefix + "*"):
            ids = [raw.decode() for raw in client.lrange(key, 0, -1)]
            lists[key.decode()[len(prefix) :]] = ids
        ids = [job_id for each in lists.values() for job_id in each]
        assert len(ids) == len(set(ids)), "an id is twice in a list"
        assert set(ids) == _names(client.zrange(f"{base}o:{band}", 0, -1))
        queued |= set(ids)
        active = _names(client.zrange(f"{base}a:{band}", 0, -1))
        idle = _names(client.zrange(f"{base}i:{band}", 0, -1))
        assert active == {tenant for tenant in lists if tenant not in parked}
        assert not active & idle
        eligible = eligible or bool(active)
        urgent = urgent or (bool(active) and band is not Band.BATCH)
        if not active:
            assert float(client.hget(base + "s", f"lag:{band}") or 0) == 0
        for tenant, ids in lists.items():
            for job_id in ids:
                _, job_band, owner = jobs[job_id].split("|", 2)
                assert (job_band, owner) == (band, tenant)

    bounded = _names(client.zrange(base + "e", 0, -1))
    assert bounded <= queued | delayed

    assert not queued & leases
    assert not queued & delayed
    assert not leases & delayed
    assert set(jobs) == queued | leases | delayed
    assert leases == _names(client.hkeys(base + "lo"))
    assert cancel <= leases
    for job_id, entry in jobs.items():
        tenant = entry.split("|", 2)[2]
        (running if job_id in leases else waiting)[tenant] += 1
    assert _counts(client.hgetall(base + "n")) == waiting
    assert _counts(client.hgetall(base + "if")) == running
    totals = {
        name.decode(): int(score)
        for name, score in client.zrange(base + "t", 0, -1, withscores=True)
    }
    assert totals == dict(waiting + running)
    assert client.llen(queue) == len(queued), "the mirror tells another depth"
    paused = client.hget(base + "s", "mode") == b"paused"
    bell, batch_bell = client.llen(base + "bell"), client.llen(base + "bell:batch")
    only_batch = eligible and not urgent
    assert bell == 1 or (only_batch and batch_bell == 1) or not eligible or paused, (
        "work waits and the bell is silent"
    )
    assert bell <= 1
    assert batch_bell <= 1

    letters = [
        (entry.decode(), fields[b"id"].decode()) for entry, fields in client.xrange(base + "dead")
    ]
    assert len(letters) <= 1_000
    assert len({job_id for _, job_id in letters}) == len(letters)

    keys = sorted(key.decode() for key in client.scan_iter("fb:job:*", count=1_000))
    records = [key for key in keys if key.count(":") == 2]
    pipe = client.pipeline(transaction=False)
    for key in records:
        pipe.hgetall(key)
        pipe.lrange(key + ":events", 0, -1)
        for part in (key, key + ":events", key + ":text"):
            pipe.ttl(part)
    replies = pipe.execute()
    for n, key in enumerate(records):
        raw, log, *lifetimes = replies[5 * n : 5 * n + 5]
        if raw[b"model"] == queue.encode():
            job_id = key.rsplit(":", 1)[1]
            status = Status(raw[b"status"].decode())
            assert (status is Status.QUEUED) == (job_id in queued | delayed)
            assert (status is Status.CANCELLING) == (job_id in cancel)
            assert (status in TERMINAL) == (job_id not in jobs)
            if b"letter" in raw:
                assert status is Status.FAILED
                assert (raw[b"letter"].decode(), job_id) in letters or len(letters) == 1_000
            assert (job_id in bounded) == (status is Status.QUEUED and b"deadline_ms" in raw)
            _check_log(status, int(raw[b"seq"]), log)
            for lifetime in lifetimes:
                absent = lifetime == -2
                assert absent or (lifetime > 0) == (status in TERMINAL)


def _check_log(status: Status, last: int, lines: list[bytes]) -> None:
    log = [orjson.loads(line) for line in lines]
    assert [event["seq"] for event in log] == list(range(last - len(log) + 1, last + 1))
    kinds = [EventType(event["type"]) for event in log]
    ends = [place for place, kind in enumerate(kinds) if kind.is_terminal]
    for place in ends:
        if place == len(kinds) - 1:
            assert kinds[place] == f"job.{status}", "the last event tells another end"
        else:
            assert kinds[place + 1] is EventType.QUEUED, "something came after the end"
    assert (status in TERMINAL) == bool(kinds and kinds[-1].is_terminal)


def _names(raw: object) -> set[str]:
    return {name.decode() for name in raw}  # type: ignore[attr-defined]


def _counts(raw: dict[bytes, bytes]) -> dict[str, int]:
    counts = {name.decode(): int(value) for name, value in raw.items()}
    assert all(count > 0 for count in counts.values()), "a counter at zero was kept"
    return counts
