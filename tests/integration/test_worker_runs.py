"""Jobs through real Celery workers: fairly, once each, and stopped when that is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.app import make_app
from broker.jobs import Status
from broker.transport import NotForMessagesError
from config.settings import Settings
from tests.conftest import PATIENCE_S
from tests.integration.worker_lab import QUEUE, Lab, until


@pytest.fixture
def lab(broker_url: str, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(broker_url, tmp_path)
    yield lab
    lab.close()


@pytest.fixture
def valkey_lab(valkey: str, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(valkey, tmp_path)
    yield lab
    lab.close()


def test_every_job_runs_once_on_two_workers(lab: Lab) -> None:
    ids = [job for number in range(4) for job in lab.put(60, tenant=f"t{number}", sleep_s=0.005)]
    lab.start_many(2)
    lab.await_end(ids)
    ids += (late := lab.put(60, sleep_s=0.005))
    lab.await_end(late)
    lab.assert_completed_once(ids)
    assert sorted(line.split(":")[0] for line in lab.starts()) == sorted(ids)
    assert {line.split(":")[2] for line in lab.starts()} == {str(w.pid) for w in lab.workers}


def test_newcomer_starts_at_once_behind_a_long_queue(valkey_lab: Lab) -> None:
    lab = valkey_lab
    lab.put(5_000, tenant="hoarder", sleep_s=0.005)
    lab.start(concurrency=8)
    until(lambda: len(lab.starts()) > 100, "the hoarder's jobs run")
    before = len(lab.starts())
    ids = lab.put(5, tenant="newcomer", sleep_s=0.005)
    lab.await_end(ids)
    order = [line.split(":")[0] for line in lab.starts()]
    # Alternating with the hoarder, behind the 8 jobs that ran and the claims under way.
    assert max(order.index(job_id) for job_id in ids) < before + 60


def test_next_job_follows_at_once(valkey_lab: Lab) -> None:
    """One slot, so each job must be claimed when the one before ends: no bell, no poll timeout."""
    lab = valkey_lab
    lab.start(concurrency=1)
    ids = lab.put(50, sleep_s=0.001)
    assert lab.await_end(ids) < 25  # a second's wait per job would be 50


def test_capped_tenant_goes_on_when_its_job_ends(valkey_lab: Lab) -> None:
    """The claim came back short though work waits; the end of a job must ring for the next."""
    from broker.policies import TenantPolicy

    lab = valkey_lab
    lab.queue.set_policy("acme", TenantPolicy(max_in_flight=1))
    lab.start(concurrency=4)
    ids = lab.put(50, sleep_s=0.01)
    assert lab.await_end(ids) < 25  # a second's wait per job would be 50


@pytest.mark.parametrize("order", [{"raise": "SystemExit"}, {"raise": "MemoryError"}])
def test_whatever_a_task_raises_its_slot_is_freed(valkey_lab: Lab, order: dict[str, str]) -> None:
    lab = valkey_lab
    lab.start(concurrency=1)
    (bad,) = lab.put(attempts=1, **order)
    (good,) = lab.put()
    lab.await_end([good, bad])
    assert lab.job(good).status is Status.COMPLETED
    assert lab.job(bad).status is Status.FAILED


def test_unsettled_job_is_tried_again(valkey_lab: Lab) -> None:
    lab = valkey_lab
    lab.start(concurrency=1)
    (bad,) = lab.put(attempts=2, unsettled=True)
    lab.await_end([bad])
    job = lab.job(bad)
    assert (job.status, job.attempt) == (Status.FAILED, 2)
    assert [line["event"] for line in lab.log()].count("job_left_unsettled") == 2


def test_cancel_reaches_a_running_job(lab: Lab) -> None:
    lab.start(concurrency=1)
    (job_id,) = lab.put(sleep_s=20)
    lab.await_start(job_id)
    assert lab.queue.cancel(job_id) == "cancelling"
    assert lab.await_end([job_id]) < 15  # of the 20 that it would take
    assert lab.job(job_id).status is Status.CANCELLED


def test_celery_control_and_events_work(lab: Lab) -> None:
    worker = lab.start(concurrency=2)
    app = make_app(Settings(redis={"url": lab.url}), model_queues=[QUEUE])
    node = f"w{worker.pid}@test"
    inspect = app.control.inspect(timeout=PATIENCE_S, limit=1)
    assert inspect.ping() == {node: {"ok": "pong"}}
    seen: list[dict[str, object]] = []
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})
        consuming = receiver.itercapture(limit=None, timeout=PATIENCE_S, wakeup=True)
        next(consuming)  # subscribed
        (job_id,) = lab.put(sleep_s=20)
        lab.await_start(job_id)
        (active,) = inspect.active()[node]
        assert (active["id"], active["name"]) == (job_id, "forebay.run_job")
        app.control.revoke(job_id, terminate=True)
        assert lab.await_end([job_id]) < 15  # of the 20 that it would take
        kinds: set[object] = set()
        for _ in consuming:
            kinds = {event["type"] for event in seen if event.get("uuid") == job_id}
            if "task-succeeded" in kinds:
                break
        consuming.close()
    assert {"task-received", "task-started", "task-succeeded"} <= kinds
    assert lab.job(job_id).status is Status.CANCELLED
    assert inspect.stats()[node]["pool"]["max-concurrency"] == 2
    app.close()


def test_model_queue_takes_no_messages(valkey: str) -> None:
    app = make_app(Settings(redis={"url": valkey}), model_queues=[QUEUE])
    with pytest.raises(NotForMessagesError, match="come in through"):
        app.send_task("forebay.run_job", ["job_x"], queue=QUEUE, retry=False)
    with app.connection() as connection, pytest.raises(NotForMessagesError):
        connection.default_channel.queue_purge(QUEUE)
    app.close()
