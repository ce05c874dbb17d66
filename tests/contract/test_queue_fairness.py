"""Who runs next: tenants by weight, bands by share, caps."""

from __future__ import annotations

from collections import Counter

import pytest

from broker import keys
from broker.jobs import Band
from tests.contract.harness import MODEL, Harness, policy


def _serve(harness: Harness, count: int) -> list[tuple[str, Band]]:
    """Run jobs one after the other; returns tenant and band in the order of their starts."""
    order = []
    for _ in range(count):
        claim = harness.claim_one()
        order.append((claim.job.tenant, claim.job.band))
        assert harness.finish(claim)
    return order


def test_tenants_share_by_weight(harness: Harness) -> None:
    for tenant, weight in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        harness.queue.set_policy(tenant, policy(weight=weight))
        for _ in range(90):
            harness.submit(tenant)
    served = Counter(tenant for tenant, _ in _serve(harness, 140))
    assert served == {"a": 20, "b": 40, "c": 80}


def test_shares_are_of_tokens_and_not_of_jobs(harness: Harness) -> None:
    for _ in range(40):
        harness.submit("small", cost=100)
        harness.submit("large", cost=300)
    served = Counter(tenant for tenant, _ in _serve(harness, 40))
    assert served["small"] == pytest.approx(30, abs=1)


def test_what_a_job_really_took_counts(harness: Harness) -> None:
    for _ in range(60):
        harness.submit("frugal", cost=1_000)
        harness.submit("greedy", cost=1_000)
    served: Counter[str] = Counter()
    for _ in range(60):
        claim = harness.claim_one()
        served[claim.job.tenant] += 1
        harness.finish(claim, tokens=250 if claim.job.tenant == "frugal" else 1_000)
    assert served["frugal"] == pytest.approx(48, abs=2)


def test_a_newcomer_does_not_wait_behind_a_hoarder(harness: Harness) -> None:
    for _ in range(300):
        harness.submit("hoarder")
    _serve(harness, 100)
    for _ in range(5):
        harness.submit("newcomer")
    order = [tenant for tenant, _ in _serve(harness, 12)]
    assert order.count("newcomer") == 5
    assert "newcomer" in order[:2]
    assert order[:10].count("newcomer") == 5


def test_idling_saves_up_nothing(harness: Harness) -> None:
    harness.submit("idler")
    for _ in range(200):
        harness.submit("busy")
    _serve(harness, 101)
    for _ in range(50):
        harness.submit("idler")
    served = Counter(tenant for tenant, _ in _serve(harness, 40))
    assert served["idler"] == pytest.approx(20, abs=1)


def test_a_refund_does_not_hold_up_a_newcomer(harness: Harness) -> None:
    for _ in range(100):
        harness.submit("hoarder", cost=1_000)
    for claim in harness.claim(30):
        harness.submit("newcomer", cost=1_000)
        harness.finish(claim, tokens=10)
    # All that is left of 30,000 tokens given back is one job's worth of what jobs take, 10.
    order = [claim.job.tenant for claim in harness.claim(13)]
    assert "newcomer" in order[:3]
    assert order.count("newcomer") == 6


def test_a_newcomer_gets_its_part_of_the_slots_when_jobs_take_less_than_they_might(
    harness: Harness,
) -> None:
    """32 slots; jobs may take 4,000 tokens each and take 40."""
    for n in range(400):
        harness.submit("hoarder", cost=4_000)
        if n < 100:
            harness.submit("newcomer", cost=4_000, delay_ms=1_000)
    running = harness.claim(32)

    def turn() -> None:
        harness.finish(running.pop(0), tokens=40)
        running.append(harness.claim_one())

    for _ in range(64):
        turn()
    harness.advance(2_000)
    for _ in range(64):
        turn()
    held = Counter(claim.job.tenant for claim in running)
    assert held["newcomer"] == pytest.approx(16, abs=3)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_jobs_that_take_nothing_still_take_turns(harness: Harness, names: tuple[str, str]) -> None:
    hoarder, newcomer = names
    for _ in range(50):
        harness.submit(hoarder)
    for _ in range(20):
        harness.finish(harness.claim_one(), tokens=0)
    for _ in range(5):
        harness.submit(newcomer)
    order = []
    for _ in range(12):
        claim = harness.claim_one()
        order.append(claim.job.tenant)
        harness.finish(claim, tokens=0)
    assert order.count(newcomer) == 5


def test_higher_bands_go_first_and_lower_ones_keep_their_shares(harness: Harness) -> None:
    for band in Band:
        for n in range(200):
            harness.submit(f"t{n % 3}", band=band)
    order = [band for _, band in _serve(harness, 200)]
    assert order[0] is Band.INTERACTIVE
    served = Counter(order)
    assert served[Band.INTERACTIVE] == pytest.approx(150, abs=2)
    assert served[Band.STANDARD] == pytest.approx(40, abs=2)
    assert served[Band.BATCH] == pytest.approx(10, abs=2)


def test_two_backlogged_bands_split_the_shares_of_two(harness: Harness) -> None:
    for _ in range(150):
        harness.submit(band=Band.STANDARD)
        harness.submit(band=Band.BATCH)
    served = Counter(band for _, band in _serve(harness, 100))
    assert served[Band.STANDARD] == pytest.approx(80, abs=2)


def test_a_band_alone_is_owed_nothing_later(harness: Harness) -> None:
    for _ in range(50):
        harness.submit(band=Band.BATCH)
    _serve(harness, 50)
    for _ in range(10):
        harness.submit(band=Band.INTERACTIVE)
    harness.submit(band=Band.BATCH)
    assert [band for _, band in _serve(harness, 8)] == [Band.INTERACTIVE] * 8


def test_a_lower_band_runs_at_once_when_it_is_alone(harness: Harness) -> None:
    harness.submit(band=Band.BATCH)
    assert harness.claim_one().job.band is Band.BATCH


def test_a_cap_holds_and_others_go_on(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_in_flight=2))
    for _ in range(5):
        harness.submit("a")
    harness.submit("a", band=Band.BATCH)
    harness.submit("b")
    claims = harness.claim(9)
    assert Counter(claim.job.tenant for claim in claims) == {"a": 2, "b": 1}
    assert harness.claim(9) == []
    harness.submit("a")
    assert harness.claim(9) == []
    harness.finish(next(claim for claim in claims if claim.job.tenant == "a"))
    assert [claim.job.tenant for claim in harness.claim(9)] == ["a"]


@pytest.mark.parametrize("way", ["requeue", "expiry"])
def test_a_slot_is_free_again_however_the_job_ends(harness: Harness, way: str) -> None:
    harness.queue.set_policy("a", policy(max_in_flight=1))
    ids = [harness.submit("a") for _ in range(2)]
    claim = harness.claim_one()
    if way == "requeue":
        harness.queue.requeue(claim)
    else:
        harness.advance(11_000)
    assert [claim.job.id for claim in harness.claim(9)] == ids[:1]


def test_raising_a_cap_lets_a_parked_tenant_run(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_in_flight=1))
    for _ in range(4):
        harness.submit("a")
    harness.claim(9)
    harness.queue.set_policy("a", policy(max_in_flight=3))
    assert len(harness.claim(9)) == 2
    harness.queue.set_policy("a", None)
    assert len(harness.claim(9)) == 1


def test_lowering_a_cap_holds_from_the_next_start_on(harness: Harness) -> None:
    for _ in range(6):
        harness.submit("a")
    claims = harness.claim(3)
    harness.queue.set_policy("a", policy(max_in_flight=2))
    assert harness.claim(9) == []
    for claim in claims[:2]:
        harness.finish(claim)
    assert len(harness.claim(9)) == 1


def test_caps_are_per_queue(harness: Harness) -> None:
    harness.queue.set_policy("a", policy(max_in_flight=1))
    harness.submit("a")
    harness.submit("a", model="embedder")
    assert len(harness.claim(9)) == 1
    assert len(harness.queue.claim("embedder", "w1", limit=9)) == 1


def test_a_cancelled_job_that_never_ran_costs_nothing(harness: Harness) -> None:
    doomed = [harness.submit("a", cost=1_000_000) for _ in range(3)]
    for job_id in doomed:
        harness.queue.cancel(job_id)
    for _ in range(10):
        harness.submit("a")
        harness.submit("b")
    served = Counter(tenant for tenant, _ in _serve(harness, 10))
    assert served == {"a": 5, "b": 5}


def test_odd_tenant_names(harness: Harness) -> None:
    names = ["a|b", "*", "a:b", "interactive", "with space", "ü", "100|batch|x", "{x}"]
    for name in names:
        harness.submit(name)
    claims = harness.claim(20)
    assert sorted(claim.job.tenant for claim in claims) == sorted(names)
    assert {row.tenant for row in harness.queue.stats(MODEL).top_tenants} == set(names)
    for claim in claims:
        assert harness.queue.requeue(claim)


def test_a_tenant_that_takes_little_of_what_it_announces_keeps_its_share(harness: Harness) -> None:
    """4 slots, equal weights; the jobs of both take the same, one announces ten times as much."""
    tokens = [40, 160, 100, 20, 180]
    for n in range(250):
        harness.submit("exact", cost=tokens[n % 5])
        harness.submit("cautious", cost=10 * tokens[n % 5])
    running = harness.claim(4)
    taken: Counter[str] = Counter()
    for _ in range(300):
        claim = running.pop(0)
        cost, tenant = claim.job.cost, claim.job.tenant
        took = cost // 10 if tenant == "cautious" else cost
        taken[tenant] += took
        harness.finish(claim, tokens=took)
        running.append(harness.claim_one())
    assert taken["cautious"] == pytest.approx(taken["exact"], rel=0.05)


def test_a_bands_share_is_of_tokens_really_used(harness: Harness) -> None:
    """Batch jobs take a fifth of what they announce, interactive ones all of it."""
    for n in range(400):
        harness.submit("people", band=Band.INTERACTIVE, cost=100)
        if n < 150:
            harness.submit("machine", band=Band.BATCH, cost=500)
    taken: Counter[Band] = Counter()
    for _ in range(400):
        claim = harness.claim_one()
        taken[claim.job.band] += 100
        harness.finish(claim, tokens=100)
    assert taken[Band.BATCH] == pytest.approx(taken.total() / 16, rel=0.1)


def test_batch_jobs_fill_their_slots_and_no_more(harness: Harness) -> None:
    for _ in range(6):
        harness.submit("machine", band=Band.BATCH)
    assert len(harness.claim(8, batch_room=3)) == 3
    assert harness.claim(8, batch_room=0) == []
    urgent = harness.submit("people", band=Band.INTERACTIVE)
    plain = harness.submit("people", band=Band.STANDARD)
    assert [each.job.id for each in harness.claim(8, batch_room=0)] == [urgent, plain]
    assert len(harness.claim(8, batch_room=1)) == 1
    assert len(harness.claim(8)) == 2


def test_a_band_without_room_runs_up_no_debt(harness: Harness) -> None:
    """A long light load beside a batch flood must not buy batch the slots of a later rush."""
    for _ in range(100):
        harness.submit("people", band=Band.INTERACTIVE)
        harness.submit("machine", band=Band.BATCH)
    for _ in range(60):
        (claim,) = harness.claim(1, batch_room=0)
        harness.finish(claim)
    order = [band for _, band in _serve(harness, 16)]
    assert order.count(Band.BATCH) <= 1


def test_work_without_room_here_rings_for_others_once(harness: Harness) -> None:
    if harness.client is None:
        pytest.skip("no bells in memory")
    bell, batch_bell = keys.bell(MODEL), keys.batch_bell(MODEL)
    harness.submit("machine", band=Band.BATCH)
    harness.client.delete(bell)
    for _ in range(2):
        assert harness.claim(1, batch_room=0) == []
    assert (harness.client.llen(bell), harness.client.llen(batch_bell)) == (0, 1)
    harness.queue.wake(MODEL, "w1")
    assert harness.client.llen(keys.wake(MODEL, "w1")) == 1
    assert 0 < harness.client.pttl(keys.wake(MODEL, "w1")) <= 10_000


def test_what_a_tenants_jobs_took_is_forgotten_after_an_hour(harness: Harness) -> None:
    if harness.client is None:
        pytest.skip("the memory of a process")
    harness.submit("gone")
    harness.finish(harness.claim_one(), tokens=10)
    state = f"{keys.base(MODEL)}s"
    assert harness.client.hexists(state, "u:gone")
    harness.advance(3_700_000)
    harness.queue.sweep(MODEL)
    assert not harness.client.hexists(state, "u:gone")
