"""Listing a tenant's jobs."""

from __future__ import annotations

import pytest

from broker.errors import JobNotFoundError
from broker.jobs import Band, Status
from tests.contract.harness import Harness


def _ids(page: tuple[list, bool]) -> list[str]:  # type: ignore[type-arg]
    return [job.id for job in page[0]]


def test_newest_first_and_oldest_first(harness: Harness) -> None:
    ids = [harness.submit(id=f"job_{n}") for n in range(4)]
    assert _ids(harness.queue.list_jobs("acme")) == ids[::-1]
    assert _ids(harness.queue.list_jobs("acme", newest_first=False)) == ids


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_join_without_gap_or_repeat(harness: Harness, newest_first: bool) -> None:
    ids = [harness.submit(id=f"job_{n:02d}") for n in range(7)]
    seen: list[str] = []
    more, after = True, None
    while more:
        jobs, more = harness.queue.list_jobs(
            "acme", limit=3, after=after, newest_first=newest_first
        )
        seen += [job.id for job in jobs]
        after = seen[-1]
    assert seen == (ids[::-1] if newest_first else ids)


def test_a_full_last_page_has_no_more(harness: Harness) -> None:
    for _ in range(3):
        harness.submit()
    assert harness.queue.list_jobs("acme", limit=3)[1] is False
    assert harness.queue.list_jobs("acme", limit=2)[1] is True


def test_tenants_see_only_their_own(harness: Harness) -> None:
    mine, other = harness.submit("a"), harness.submit("b")
    assert _ids(harness.queue.list_jobs("a")) == [mine]
    with pytest.raises(JobNotFoundError):
        harness.queue.list_jobs("a", after=other)
    assert harness.queue.list_jobs("nobody") == ([], False)


def test_an_unknown_cursor_is_not_found(harness: Harness) -> None:
    harness.submit()
    with pytest.raises(JobNotFoundError):
        harness.queue.list_jobs("acme", after="job_none")


def test_filters(harness: Harness) -> None:
    batch = harness.submit(band=Band.BATCH)
    other = harness.submit(model="embedder")
    running = harness.submit()
    claim = harness.claim_one()
    assert claim.job.id == running
    queued = harness.queue.list_jobs("acme", status=Status.QUEUED)
    assert sorted(_ids(queued)) == sorted([batch, other])
    assert _ids(harness.queue.list_jobs("acme", status=Status.IN_PROGRESS)) == [running]
    assert _ids(harness.queue.list_jobs("acme", model="embedder")) == [other]
    assert _ids(harness.queue.list_jobs("acme", band=Band.BATCH)) == [batch]
    both = harness.queue.list_jobs("acme", band=Band.BATCH, status=Status.COMPLETED)
    assert both == ([], False)


def test_created_after(harness: Harness) -> None:
    first = harness.submit()
    since = harness.queue.get(first).created_ms
    for newest_first in (True, False):
        everything = harness.queue.list_jobs(
            "acme", created_after_ms=since, newest_first=newest_first
        )
        nothing = harness.queue.list_jobs(
            "acme", created_after_ms=since + 3_600_000, newest_first=newest_first
        )
        assert (_ids(everything), _ids(nothing)) == ([first], [])


def test_bodies_and_outputs_are_left_out(harness: Harness) -> None:
    job_id = harness.submit(metadata=b'{"k":"v"}')
    harness.finish(harness.claim_one())
    (job,) = harness.queue.list_jobs("acme")[0]
    full = harness.queue.get(job_id)
    assert (job.body, job.output) == (b"", None)
    assert (job.metadata, job.status, job.usage) == (full.metadata, full.status, full.usage)
    assert (full.body, full.output) == (b'{"messages":[]}', b'{"ok":true}')


def test_rare_matches_are_found_far_back(harness: Harness) -> None:
    wanted = harness.submit(band=Band.BATCH)
    for _ in range(1_100):
        harness.submit()
    assert _ids(harness.queue.list_jobs("acme", band=Band.BATCH)) == [wanted]
