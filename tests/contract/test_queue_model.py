"""Random histories on Redis and in memory: same answers, same race, no invariant ever broken.

After every step the keys in Redis must hold together (`invariants.py`), and the race must stand as
`fairness.py` has it. Crashes are injected between script calls: answers are lost and calls
repeated, processes die between a call and its answer, workers fall silent past their leases. At the
end all that is left is run, and every job that was ever accepted must have come to one end.

Time in Redis is its own clock, so each step first sets all times there to those in memory.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from broker import keys
from broker.drain import FADING_MS, Drain
from broker.errors import (
    BrokerError,
    BrokerUnavailableError,
    QueueFullError,
    RateLimitedError,
)
from broker.jobs import BANDS, Accepted, Band, Claim, Delta, NewJob, Outcome, Status, Usage
from broker.limits import RateLimits
from broker.memory import MemoryQueue
from broker.pace import Pace
from broker.policies import TenantPolicy
from broker.queue import JobQueue
from broker.redis_queue import RedisQueue
from broker.usage import MOST_HOURS
from broker.wire import Arg
from tests.contract.harness import LEASE_MS, MODEL, ManualClock, new_job
from tests.contract.harness import settings as queue_settings
from tests.contract.invariants import check

TENANTS = st.sampled_from(["a", "b", "c", "ü|x"])
#: A tenth of a minute each, as are the costs of jobs that are under limits: the times at which they
#: let a job in are whole steps of the clock away from each other.
LIMITS = st.sampled_from(
    [
        RateLimits(),
        RateLimits(),
        RateLimits(requests_per_minute=6),
        RateLimits(requests_per_minute=6, tokens_per_minute=600),
        RateLimits(max_jobs=3),
    ]
)
JOBS = st.fixed_dictionaries(
    {
        "tenant": TENANTS,
        "band": st.sampled_from(BANDS),
        "cost": st.integers(1, 20).map(lambda hundreds: hundreds * 100),
        "delay_ms": st.sampled_from([0, 0, 0, 5_000]),
        "max_attempts": st.integers(1, 3),
        "limits": LIMITS,
        "key_id": st.sampled_from(["k1", "k2"]),
        "key_limits": LIMITS,
        #: From now on; 0 is without one.
        "deadline_ms": st.sampled_from([0, 0, 0, 2_000, 8_000]),
        #: At times two requests share one.
        "idempotency_key": st.sampled_from(["", "", "", "x", "y"]),
        "fingerprint": st.sampled_from(["1", "1", "2"]),
        "batch_line": st.sampled_from([False, False, False, True]),
    }
)
CRASH = st.sampled_from([False, False, True])
PICK = st.integers(0, 50)


OWNERS = st.sampled_from(["w1", "w2"])
#: Methods of `Twins`: how often each is called, and with what. One rule with weights instead of a
#: rule each, because hypothesis leaves some rules out of each run, and a history without claims
#: says little.
MOVES: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "put_in": (3, {"jobs": st.lists(JOBS, min_size=1, max_size=4), "crash": CRASH}),
    "api_dies_between_accept_and_answer": (1, {"fields": JOBS}),
    "cancel": (1, {"picks": st.lists(PICK, min_size=1, max_size=3), "crash": CRASH}),
    "erase": (1, {"pick": PICK, "crash": CRASH}),
    "retry": (2, {"pick": PICK, "deadline": st.sampled_from([0, 8_000]), "crash": CRASH}),
    "claim": (
        6,
        {
            "limit": st.integers(1, 4),
            "room": st.sampled_from([None, None, 0, 1, 2]),
            "owner": OWNERS,
            "crash": CRASH,
        },
    ),
    "act": (
        9,
        {
            "deed": st.sampled_from(
                [*["complete"] * 4, "fail", "requeue", "bury", "emit", "renew"]
            ),
            "stale": st.sampled_from([False, False, False, True]),
            "pick": PICK,
            "tokens": st.integers(0, 30).map(lambda hundreds: hundreds * 100),
            "delay_ms": st.sampled_from([0, 5_000]),
            "refund": st.booleans(),
            "crash": CRASH,
        },
    ),
    "worker_dies_and_comes_back": (1, {"owner": OWNERS, "crash": CRASH}),
    "time_passes": (2, {"milliseconds": st.sampled_from([3_000, 3_000, LEASE_MS])}),
    "look_after": (
        2,
        {
            "deed": st.sampled_from(["set", "set", "forget", "sweep", "sweep", "count"]),
            "tenant": TENANTS,
            "weight": st.sampled_from([0.3, 1.0, 4.0]),
            "cap": st.integers(1, 4),
            "crash": CRASH,
        },
    ),
    "switch": (1, {"mode": st.sampled_from(["pause", "drain", *["resume"] * 4]), "crash": CRASH}),
    "attend_to_the_dead": (
        1,
        {
            "deed": st.sampled_from(["replay", "replay", "purge"]),
            "tenant": st.one_of(st.none(), TENANTS),
            "limit": st.integers(1, 3),
        },
    ),
    "ask_for_a_position": (1, {"pick": PICK}),
}
MOVE = st.sampled_from([name for name, (times, _) in MOVES.items() for _ in range(times)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(MOVES[name][1]))
)
SETTINGS = queue_settings(default_max_queued=8, max_queued_total=20, default_max_in_flight=3)
BASE = f"fb:{{{MODEL}}}:"


class LossyQueue(RedisQueue):
    """Loses as many of the next answers as it is told; the server has done what was asked."""

    losses = 0

    def _send(self, commands: Sequence[Sequence[Arg]]) -> list[Any]:
        replies = super()._send(commands)
        if self.losses:
            self.losses -= 1
            raise redis.ConnectionError("lost")
        return replies


class Twins(RuleBasedStateMachine):
    """Does the same to both queues and compares."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.clock = ManualClock()
        self.memory = MemoryQueue(SETTINGS, self.clock)
        self.redis = LossyQueue(self.client, SETTINGS)
        self.redis.load_scripts()
        #: The clock of Redis minus that in memory, when they were last compared.
        self.apart = 0
        self.aligned_s = time.monotonic()
        #: Jobs that were accepted.
        self.ids: list[str] = []
        #: Claims ever answered.
        self.claims: list[Claim] = []

    # -- doing the same to both -------------------------------------------------------------------
    def both(self, call: Callable[[JobQueue], Any], *, crash: bool = False) -> Any:
        """The common outcome of a call; with `crash` its first answer is lost on the way.

        What a repeat can't tell again isn't compared then: where a job stood, how many there were.
        """
        self.align()
        self.redis.losses = int(crash)
        real, twin = _outcome(call, self.redis), _outcome(call, self.memory)
        assert self.redis.losses == 0
        assert type(real) is type(twin), (real, twin)
        if crash:
            if isinstance(real, Accepted):
                assert real.job_id == twin.job_id
        elif isinstance(real, Accepted):
            assert replace(real, limits=()) == replace(twin, limits=())
            _compare_limits(real.limits, twin.limits)
        elif isinstance(real, RateLimitedError):
            _compare_limits(real.limits, twin.limits)
        elif isinstance(real, BrokerError):
            if isinstance(real, QueueFullError):
                assert 1_000 <= real.retry_after_ms <= 600_000
            assert (type(real), str(real)) == (type(twin), str(twin))
        else:
            assert real == twin
        return real

    def align(self) -> None:
        """Set all times in Redis to those in memory."""
        state = self.memory._queues.get(MODEL)
        if state is None:
            return
        pipe = self.client.pipeline(transaction=False)
        seconds, micros = self.client.time()
        offset = seconds * 1000 + micros // 1000 - self.clock.now
        self.apart, self.aligned_s = offset, time.monotonic()
        for job_id, lease in state.leases.items():
            pipe.zadd(BASE + "l", {job_id: lease.deadline_ms + offset})
        for job_id, due in state.delayed.items():
            pipe.zadd(BASE + "d", {job_id: due + offset})
        for name, drain in state.drains.items():
            there = replace(drain, at_ms=drain.at_ms + offset)
            pipe.hset(BASE + "s", "d" if name is None else f"d:{name}", there.pack())
        for name, coming in (
            *((f"b:{band}", each) for band, each in state.coming.items()),
            *((f"w:{tenant}", each) for tenant, each in state.coming_of.items()),
        ):
            there = replace(coming, at_ms=coming.at_ms + offset)
            pipe.hset(BASE + "s", name, there.pack())
        if state.pace != Pace():
            pipe.hset(BASE + "s", "pace", state.pace.pack())
        for band, since in state.since.items():
            for job_id, moment in since.items():
                pipe.zadd(f"{BASE}o:{band}", {job_id: moment + offset})
        for (scope, kind, owner), at in self.memory._meters.times.items():
            pipe.hset(keys.limits(scope[0], owner), kind, repr(at + offset))
            pipe.persist(keys.limits(scope[0], owner))
        for job_id in self.ids:
            record = self.memory._records[job_id]
            pipe.hset(keys.job(job_id), "queued_ms", record.since_ms + offset)
            if record.job.started_ms:
                pipe.hset(keys.job(job_id), "started_ms", record.job.started_ms + offset)
            if record.job.deadline_ms:
                deadline = record.job.deadline_ms + offset
                pipe.hset(keys.job(job_id), "deadline_ms", deadline)
                pipe.zadd(BASE + "e", {job_id: deadline}, xx=True)
        pipe.execute()

    def pick(self, number: int) -> str:
        return self.ids[number % len(self.ids)] if self.ids else "job_none"

    @rule(move=MOVE)
    def go_on(self, move: tuple[str, dict[str, Any]]) -> None:
        name, fields = move
        getattr(self, name)(**fields)

    # -- submitting side --------------------------------------------------------------------------
    @initialize(jobs=st.lists(JOBS, min_size=5, max_size=12))
    def begin(self, jobs: list[dict[str, Any]]) -> None:
        for fields in jobs:
            self.enqueue(fields, crash=False)

    def put_in(self, jobs: list[dict[str, Any]], crash: bool) -> None:
        for fields in jobs:
            self.enqueue(fields, crash=crash)

    def new(self, fields: dict[str, Any]) -> NewJob:
        deadline = fields["deadline_ms"]
        return new_job(**{**fields, "deadline_ms": deadline and self.clock.now + deadline})

    def enqueue(self, fields: dict[str, Any], *, crash: bool) -> Any:
        job = self.new(fields)
        answer = self.both(lambda queue: queue.enqueue(job), crash=crash)
        self.note(answer)
        return answer

    def note(self, answer: Any) -> None:
        if isinstance(answer, Accepted) and not answer.replayed:
            self.ids.append(answer.job_id)

    def api_dies_between_accept_and_answer(self, fields: dict[str, Any]) -> None:
        """No answer ever came; the client asks again, and another process answers."""
        first = self.new({**fields, "idempotency_key": "crashed"})
        self.align()
        self.redis.losses = 2
        with pytest.raises(BrokerUnavailableError):
            self.redis.enqueue(first)
        self.note(_outcome(lambda queue: queue.enqueue(first), self.memory))
        known = list(self.ids)
        again = replace(first, id=self.new(fields).id)
        answer = self.both(lambda queue: queue.enqueue(again))
        self.note(answer)
        if first.id in known:
            assert (answer.job_id, answer.replayed) == (first.id, True)

    def cancel(self, picks: list[int], crash: bool) -> None:
        ids = [*map(self.pick, picks), "job_none"]
        self.both(lambda queue: queue.cancel_many(ids, tenant="a"), crash=crash)
        self.both(lambda queue: queue.cancel(ids[0]), crash=crash)

    def erase(self, pick: int, crash: bool) -> None:
        self.both(lambda queue: queue.erase(self.pick(pick)), crash=crash)

    def retry(self, pick: int, deadline: int, crash: bool) -> None:
        ended = [each for each in self.ids if self.memory.get(each).is_terminal]
        job_id = ended[pick % len(ended)] if ended else self.pick(pick)
        moment = deadline and self.clock.now + deadline
        offset = self.offset()

        def call(queue: JobQueue) -> Accepted:
            shift = offset if moment and isinstance(queue, RedisQueue) else 0
            return queue.retry(job_id, deadline_ms=moment + shift)

        self.both(call, crash=crash)

    def offset(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds * 1000 + micros // 1000 - self.clock.now)

    # -- working side -----------------------------------------------------------------------------
    def claim(self, limit: int, owner: str, crash: bool, room: int | None = None) -> None:
        self.align()
        self.redis.losses = int(crash)
        real = self.redis.claim(MODEL, owner, limit=limit, batch_room=room)
        if crash:
            # Nobody will ever run these; their leases run out.
            self.memory.claim(MODEL, owner, limit=limit, batch_room=room)
        twin = self.memory.claim(MODEL, owner, limit=limit, batch_room=room)
        batch = sum(each.job.band is Band.BATCH for each in real)
        assert room is None or batch <= room
        assert [(each.job.id, each.attempt) for each in real] == [
            (each.job.id, each.attempt) for each in twin
        ]
        self.claims += real

    def act(
        self,
        deed: str,
        stale: bool,
        pick: int,
        tokens: int,
        delay_ms: int,
        refund: bool,
        crash: bool,
    ) -> None:
        """As a worker that holds the lease, or that doesn't know that it has lost it."""
        if not self.claims:
            return
        leases = self.memory._queues[MODEL].leases
        held = [
            claim
            for claim in self.claims
            if claim.job.id in leases and leases[claim.job.id].attempt == claim.attempt
        ]
        among = self.claims if stale or not held else held
        claim = among[pick % len(among)]
        usage = Usage(output_tokens=tokens)
        text = self.memory._records[claim.job.id].text
        delta = Delta(job_id=claim.job.id, attempt=claim.attempt, text="x", start=len(text))
        deeds: dict[str, Callable[[JobQueue], Any]] = {
            "complete": lambda q: q.complete(claim, Outcome(status=Status.COMPLETED, usage=usage)),
            "fail": lambda q: q.complete(claim, Outcome(status=Status.FAILED, usage=usage)),
            "requeue": lambda q: q.requeue(claim, delay_ms=delay_ms, refund=refund),
            "bury": lambda q: q.bury(claim, "worker_lost", "Lost."),
            "emit": lambda q: q.emit(MODEL, [delta]),
            "renew": lambda q: q.renew(MODEL, "w1", [(claim.job.id, claim.attempt)]),
        }
        done = self.both(deeds[deed], crash=crash)
        if claim in held and deed not in ("emit", "renew"):
            assert done is True

    def worker_dies_and_comes_back(self, owner: str, crash: bool) -> None:
        self.both(lambda queue: queue.release_owner(MODEL, owner), crash=crash)

    def time_passes(self, milliseconds: int) -> None:
        """Workers that don't renew meanwhile have fallen silent."""
        self.clock.now += milliseconds

    # -- operations -------------------------------------------------------------------------------
    def look_after(self, deed: str, tenant: str, weight: float, cap: int, crash: bool) -> None:
        policy = TenantPolicy(weight=weight, max_in_flight=cap, max_queued=7)
        deeds: dict[str, Callable[[JobQueue], Any]] = {
            "set": lambda queue: queue.set_policy(tenant, policy),
            "forget": lambda queue: queue.set_policy(tenant, None),
            "sweep": lambda queue: queue.sweep(MODEL),
            "count": lambda queue: queue.count_claimable(MODEL, 6),
            "count apart": lambda queue: queue.count_claimable(MODEL, 6, batch_room=2),
        }
        self.both(deeds[deed], crash=crash)

    def switch(self, mode: str, crash: bool) -> None:
        self.both(lambda queue: getattr(queue, mode)(MODEL), crash=crash)

    def attend_to_the_dead(self, deed: str, tenant: str | None, limit: int) -> None:
        if deed == "replay":
            self.both(lambda queue: queue.replay_dead(MODEL, tenant=tenant, limit=limit))
        else:
            self.both(lambda queue: queue.purge_dead(MODEL, tenant=tenant))

    # -- what must hold ---------------------------------------------------------------------------
    @invariant()
    def nothing_is_broken(self) -> None:
        check(self.client, MODEL)

    @invariant()
    def the_race_is_the_same(self) -> None:
        state = self.memory._queues.get(MODEL)
        if state is None:
            return
        kept = {key.decode(): value for key, value in self.client.hgetall(BASE + "s").items()}
        drains = {name: value for name, value in kept.items() if name.split(":")[0] == "d"}
        used = {name[2:]: value for name, value in kept.items() if name.startswith("u:")}
        raw = {
            name: float(value)
            for name, value in kept.items()
            if name not in drains
            and name[:2] not in ("u:", "b:", "w:")
            and name not in ("mode", "pace")
        }
        # The clock of Redis went on meanwhile.
        late_ms = 100 + (time.monotonic() - self.aligned_s) * 1000
        for name, twin_drain in state.drains.items():
            drain = Drain.unpack(drains.pop("d" if name is None else f"d:{name}"))
            assert drain is not None
            fading = late_ms / FADING_MS
            assert drain.jobs == pytest.approx(twin_drain.jobs, rel=fading)
            assert drain.tokens == pytest.approx(twin_drain.tokens, rel=fading)
            assert drain.busy_ms == pytest.approx(twin_drain.busy_ms, rel=fading, abs=late_ms)
        assert not drains
        # Which jobs hardly waited is a matter of milliseconds here; but not whose they can be.
        coming = {name for name in kept if name[:2] in ("b:", "w:")}
        assert coming <= {f"b:{band}" for band in BANDS} | {f"w:{name}" for name in state.drains}
        if "pace" in kept:
            pace = Pace.unpack(kept["pace"])
            assert (pace.tokens, pace.peak) == (state.pace.tokens, state.pace.peak)
            assert pace.spent_ms == pytest.approx(state.pace.spent_ms, abs=32 * late_ms)
        fair = state.fair
        assert {name: struct.unpack("<dd", each) for name, each in used.items()} == fair.own
        assert (raw.get("taken", 0.0), raw.get("estimated", 0.0)) == (fair.taken, fair.estimated)
        for band, twin in fair.bands.items():
            clock = raw.get(f"V:{band}", 0.0)
            assert clock == twin.clock
            assert raw.get(f"lag:{band}", 0.0) == twin.lag
            assert raw.get(f"due:{band}", 0.0) == twin.due
            assert self.times(f"a:{band}") == twin.active
            assert _ahead(self.times(f"i:{band}"), clock) == _ahead(twin.idle, clock)
        assert {name.decode() for name in self.client.smembers(BASE + "park")} == state.parked

    def times(self, key: str) -> dict[str, float]:
        rows = self.client.zrange(BASE + key, 0, -1, withscores=True)
        return {name.decode(): score for name, score in rows}

    @invariant()
    def readings_are_the_same(self) -> None:
        real, twin = self.redis.stats(MODEL), self.memory.stats(MODEL)
        assert [band.depth for band in real.bands] == [band.depth for band in twin.bands]
        assert (real.delayed, real.in_flight, real.dead, real.mode) == (
            twin.delayed,
            twin.in_flight,
            twin.dead,
            twin.mode,
        )
        # A lost answer makes a stale worker knock twice.
        assert real.stale_writes >= twin.stale_writes
        rows = [[(row.tenant, row.queued, row.in_flight) for row in each.top_tenants]
                for each in (real, twin)]  # fmt: skip
        assert rows[0] == rows[1]
        held = [
            {(each.job_id, each.tenant, each.attempt, each.owner) for each in queue.leases(MODEL)}
            for queue in (self.redis, self.memory)
        ]
        assert held[0] == held[1]
        letters = [
            [(each.job_id, each.code, each.attempt, each.error) for each in queue.dead_letters(
                MODEL, limit=100)[0]]
            for queue in (self.redis, self.memory)
        ]  # fmt: skip
        assert letters[0] == letters[1]

    @invariant()
    def the_same_was_taken_of_all_limits(self) -> None:
        for (scope, kind, owner), at in self.memory._meters.times.items():
            raw = self.client.hget(keys.limits(scope[0], owner), kind)
            there = float(raw or 0) - self.apart
            # What was paid off by then means nothing; all else comes in steps of ten seconds.
            assert max(there, self.clock.now) == pytest.approx(max(at, self.clock.now), abs=2_000)

    @invariant()
    def keys_hold_the_places_of_their_live_jobs(self) -> None:
        for key_id in ("k1", "k2"):
            held = {each.decode() for each in self.client.smembers(keys.key_jobs(key_id))}
            assert held == {
                job_id
                for job_id, record in self.memory._records.items()
                if record.key_max_jobs
                and record.job.key_id == key_id
                and not record.job.is_terminal
            }

    @invariant()
    def lines_of_batches_are_named_until_they_end(self) -> None:
        for tenant in ("a", "b", "c", "ü|x"):
            held = {each.decode() for each in self.client.smembers(keys.batch_lines(tenant))}
            assert held == {
                job_id
                for job_id, record in self.memory._records.items()
                if record.batch_line and record.job.tenant == tenant and not record.job.is_terminal
            }

    def ask_for_a_position(self, pick: int) -> None:
        if not self.ids:
            return
        job_id = self.pick(pick)
        self.align()
        real, twin = self.redis.position(job_id), self.memory.position(job_id)
        assert (real is None) == (twin is None)
        if real and twin:
            assert (real.position, real.exact) == (twin.position, twin.exact)
            assert (real.estimated_start_ms is None) == (twin.estimated_start_ms is None)

    def teardown(self) -> None:
        self.run_all()
        for job_id in self.ids:
            mine, theirs = self.redis.get(job_id), self.memory.get(job_id)
            assert mine.is_terminal, "lost, or stuck"
            assert (mine.status, mine.attempt, mine.seq, mine.error, mine.usage, mine.refunds) == (
                theirs.status,
                theirs.attempt,
                theirs.seq,
                theirs.error,
                theirs.usage,
                theirs.refunds,
            )
            assert self.redis.events(job_id) == self.memory.events(job_id)
        for tenant in ("a", "b", "c", "ü|x"):
            assert _used(self.redis, tenant) == _used(self.memory, tenant)
        super().teardown()

    def run_all(self) -> None:
        """Workers come back and run whatever is left."""
        self.both(lambda queue: queue.resume(MODEL))
        for _ in range(len(self.ids) * 3 + 3):
            stats = self.redis.stats(MODEL)
            if not (stats.depth or stats.delayed or stats.in_flight):
                break
            self.clock.now += LEASE_MS + 1_000
            self.claim(4, "w3", crash=False)
            for claim in self.claims[-4:]:
                outcome = Outcome(status=Status.COMPLETED)
                self.both(lambda queue, c=claim, o=outcome: queue.complete(c, o))  # type: ignore[misc]
        check(self.client, MODEL)
        for part in ("j", "n", "if", "t", "l", "lo", "d", "e", "x"):
            assert not self.client.exists(BASE + part), part


def _outcome(call: Callable[[JobQueue], Any], queue: JobQueue) -> Any:
    """What a call returned, or the error it raised."""
    try:
        return call(queue)
    except BrokerUnavailableError:
        raise
    except BrokerError as error:
        return error


def _used(queue: JobQueue, tenant: str) -> list[int]:
    """In all hours together: the clocks are years apart."""
    hours = queue.usage(tenant, hours=MOST_HOURS).hours
    counts = ("completed", "failed", "cancelled", "expired", "output_tokens")
    return [sum(getattr(each, name) for each in hours) for name in counts]


def _compare_limits(real: Any, twin: Any) -> None:
    """The clocks are some milliseconds apart."""
    assert [(each.scope, each.kind, each.limit) for each in real] == [
        (each.scope, each.kind, each.limit) for each in twin
    ]
    for mine, theirs in zip(real, twin, strict=True):
        assert mine.remaining == pytest.approx(theirs.remaining, abs=max(1, mine.limit // 100))
        assert mine.reset_ms == pytest.approx(theirs.reset_ms, abs=2_000), (real, twin)


def _ahead(times: dict[str, float], clock: float) -> dict[str, float]:
    """Entries which the clock has passed mean nothing."""
    return {tenant: time for tenant, time in times.items() if time > clock}


def _run(url: str, *, examples: int, steps: int) -> None:
    with redis.Redis.from_url(url) as client:
        machine = type("Machine", (Twins,), {"client": client})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.timeout(300)
def test_redis_and_memory_agree(broker_url: str) -> None:
    _run(broker_url, examples=15, steps=40)


@pytest.mark.chaos
@pytest.mark.timeout(3_600)
@pytest.mark.skipif("CHAOS" not in os.environ, reason="long: CHAOS=1 runs it")
def test_redis_and_memory_agree_for_long(broker_url: str) -> None:
    _run(broker_url, examples=500, steps=80)
