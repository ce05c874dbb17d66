"""RabbitMQ as the broker: a real server, real Celery workers, the simulated engine.

What is to hold is what holds on Redis: nothing lost, the same order, the same time to recover.
"""

from __future__ import annotations

import json
import os
import random
import signal
import ssl
import statistics
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.request import urlopen

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.app import make_app
from broker.errors import BrokerUnavailableError
from broker.jobs import Band, NewJob, Outcome, Status
from broker.memory import MemoryQueue
from broker.policies import TenantPolicy
from broker.ticket_issuer import MOST_WAITING
from broker.tickets import TicketOffice, queue_name
from config.settings import Queue, Settings
from loadtests.rabbitmq_node import PASSWORD, SCRIPT, RabbitMq
from tests.conftest import PATIENCE_S, free_port, missing
from tests.integration.ticket_lab import MODEL, TicketLab
from tests.integration.worker_lab import until

TTL_S = 2.0
#: What a busy machine may add; the sweep that would find lapsed leases comes every 30 s.
LATE_S = 15.0
TICKETS = queue_name(MODEL)


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMq]:
    if not SCRIPT.exists():
        missing("rabbitmq-server")
    folder = tmp_path_factory.mktemp("rabbitmq")
    node = RabbitMq(
        folder,
        (free_port(), free_port(), free_port()),
        tls=(free_port(), *_certificate(folder)),
    )
    try:
        node.start()
        yield node
    finally:
        node.close()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody but itself vouches for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def lab(rabbitmq: RabbitMq, valkey: str, tmp_path: Path) -> Iterator[TicketLab]:
    if rabbitmq.tickets(TICKETS):
        rabbitmq.purge(TICKETS)
    lab = TicketLab(valkey, rabbitmq.url, tmp_path, ttl_s=TTL_S)
    yield lab
    lab.close()
    for number in range(len(lab.workers)):
        assert PASSWORD not in lab.log(number)


def test_jobs_run_in_full_batches_and_in_the_order_of_redis(
    lab: TicketLab, rabbitmq: RabbitMq
) -> None:
    worker = lab.start(slots=1)
    lab.queue.pause(MODEL)
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    twin = MemoryQueue(Queue())
    ids = []
    for tenant, weight in weights.items():
        for queue in (lab.queue, twin):
            queue.set_policy(tenant, TenantPolicy(weight=weight))
        mine = lab.put(8 if tenant == "a" else 5, tenant=tenant)
        ids += mine
        for job_id in mine:
            new = NewJob(
                id=job_id, tenant=tenant, model=MODEL, endpoint="/v1/x", body=b"{}", cost=100
            )
            twin.enqueue(new)
    assert rabbitmq.tickets(TICKETS) == 0
    lab.queue.resume(MODEL)
    lab.await_end(ids)
    lab.assert_completed_once(ids)
    really = sorted(lab.jobs(ids), key=lambda job: (job.started_ms, job.finished_ms))
    expected = []
    while claims := twin.claim(MODEL, "w"):
        expected.append(claims[0].job.id)
        usage = lab.job(expected[-1]).usage
        assert twin.complete(claims[0], Outcome(status=Status.COMPLETED, usage=usage))
    assert [job.id for job in really] == expected

    # Alone, a job starts by its ring and not by the next look at the queue, 250 ms later or so.
    waits_ms = []
    for _ in range(20):
        (single,) = lab.jobs_after(lab.put())
        assert single.started_ms
        waits_ms.append(single.started_ms - single.created_ms)
    assert statistics.median(waits_ms) < 125

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    lab.start(slots=6)
    batch = lab.jobs_after(lab.put(6, steps=60))
    assert max(job.started_ms for job in batch) < min(job.finished_ms for job in batch)


def test_a_cap_is_kept_without_delay_and_without_spinning(lab: TicketLab) -> None:
    lab.start(slots=4)
    lab.queue.set_policy("acme", TenantPolicy(max_in_flight=1))
    ids = lab.put(25)
    # Each job takes 10 ms or so; one that waited for the next look would take 500.
    assert lab.await_end(ids) < 6.0  # 12.5 in all
    lab.assert_completed_once(ids)
    issued = lab.counted("forebay_workers_tickets_issued_total")
    found = lab.counted("forebay_workers_tickets_taken_total", found="job")
    assert found == 25
    assert 25 <= issued < 75
    # One that can't run makes no tickets while it waits.
    (long,) = lab.put(steps=100)
    until(lambda: lab.running() == 1, "the long job runs")
    (blocked,) = lab.put()
    before = lab.counted("forebay_workers_tickets_issued_total")
    lab.await_end([long])
    assert lab.counted("forebay_workers_tickets_issued_total") - before <= 3
    lab.await_end([blocked])


def test_batch_jobs_leave_slots_free_and_none_of_their_own_idle(lab: TicketLab) -> None:
    def held() -> list[int]:
        """Jobs per worker."""
        owners = Counter(lease.owner for lease in lab.queue.leases(MODEL))
        return sorted(owners.values())

    # Batch jobs take 50 s here, unless they are cancelled.
    slow = {"FOREBAY_SIMULATED__STEP_MS": "50"}
    lab.start(slots=4, **slow)
    batch = lab.put(20, steps=1_000, band=Band.BATCH)
    until(lambda: held() == [3], "batch jobs fill three of four slots")
    urgent = lab.put(5)
    lab.await_end(urgent)
    assert held() == [3]
    # Tickets go only to who has room, and the end of a batch job brings the next one.
    lab.start(slots=4, **slow)
    until(lambda: held() == [3, 3], "the other worker takes as many")
    ended = [job.id for job in lab.jobs(batch) if job.status is Status.IN_PROGRESS][:4]
    lab.queue.cancel_many(ended)
    lab.await_end(ended)
    until(lambda: held() == [3, 3], "others have taken their places")
    lab.await_end(lab.put(5))
    spent = lab.counted("forebay_workers_tickets_taken_total", found="nothing")
    assert spent < 60
    lab.queue.cancel_many(batch)
    lab.await_end(batch)
    assert {job.attempt for job in lab.jobs(batch)} <= {0, 1}


def test_flower_shows_queues_workers_and_jobs(lab: TicketLab) -> None:
    url = lab.console()

    def page(path: str) -> str:
        with urlopen(url + path, timeout=PATIENCE_S) as answer:
            text: str = answer.read().decode()
        assert PASSWORD not in text
        return text

    lab.start()
    until(lambda: "w0@" in page("/workers"), "the worker is shown")
    (job_id,) = lab.put()
    lab.await_end([job_id])
    # A ticket's task tells which job it ran as its result.
    until(lambda: job_id in page("/api/tasks"), "the job is shown")
    lab.queue.pause(MODEL)
    lab.put(3, tenant="ten_a")
    rows = json.loads(page("/api/queues/length"))["active_queues"]
    waiting = {row["name"]: row["messages"] for row in rows}
    assert waiting[MODEL] == waiting[f"{MODEL} · tenant ten_a"] == 3
    assert MODEL in page("/broker")


def test_a_killed_worker_costs_the_lease_time_and_lost_tickets_nothing(
    lab: TicketLab, rabbitmq: RabbitMq
) -> None:
    victim, _ = lab.begin(slots=4), lab.begin(slots=4)
    for worker in lab.workers:
        lab.await_ready(worker)
    ids = lab.put(80, steps=20)
    until(lambda: lab.running() == 8, "both work")
    assert 0 < rabbitmq.tickets(TICKETS) <= MOST_WAITING
    mine = [lease.job_id for lease in lab.queue.leases(MODEL) if f":{victim.pid}:" in lease.owner]
    victim.kill()
    assert rabbitmq.purge(TICKETS) > 0
    assert lab.await_end(ids) < TTL_S + LATE_S
    lab.assert_completed_once(ids)
    again = [job for job in lab.jobs(ids) if job.attempt > 1]
    assert {job.id for job in again} <= set(mine)
    assert 1 <= len(again) <= 4


def test_rabbitmq_may_be_away_while_workers_run_and_when_they_start(
    lab: TicketLab, rabbitmq: RabbitMq
) -> None:
    lab.start(slots=4)
    ids = lab.put(40, steps=20)
    until(lambda: lab.running() == 4, "jobs run")
    rabbitmq.kill()
    ids += lab.put(10)
    late = lab.start(slots=4)
    until(lambda: "tickets_not_issued" in lab.events(1), "the new worker finds nobody")
    until(lambda: lab.running() == 0, "what ran is through")
    rabbitmq.start()
    lab.await_end(ids)
    lab.assert_completed_once(ids)
    assert {job.attempt for job in lab.jobs(ids)} == {1}
    for number in range(2):
        said = lab.events(number)
        assert said.count("tickets_not_issued") == said.count("tickets_issued_again") == 1
        assert said.count("broker_unreachable") <= 1
    assert "Traceback" not in lab.log(0)
    # A worker told to go lets its job end and leaves no ticket behind that would be missed.
    ids = lab.put(12, steps=50)
    until(lambda: lab.running() == 8, "both work again")
    late.send_signal(signal.SIGTERM)
    assert late.wait(PATIENCE_S) == 0
    lab.await_end(ids)
    lab.assert_completed_once(ids)


def test_a_second_signal_hands_running_jobs_back(lab: TicketLab) -> None:
    worker = lab.start(slots=1, FOREBAY_WORKER__GRACE_S="60")
    (job_id,) = lab.put(steps=500)
    until(lambda: lab.running() == 1, "the job runs")
    worker.send_signal(signal.SIGQUIT)
    worker.wait(PATIENCE_S)
    assert (lab.job(job_id).status, lab.job(job_id).attempt) == (Status.QUEUED, 1)


def test_tls_checks_the_server(rabbitmq: RabbitMq, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(queue={"broker_url": rabbitmq.tls_url})
    office = TicketOffice(settings.queue, MODEL, "host:1:abcd")
    app = make_app(settings, model_queues=[MODEL])
    with pytest.raises(BrokerUnavailableError, match="CERTIFICATE_VERIFY_FAILED") as refused:
        office.waiting()
    assert PASSWORD not in str(refused.value)
    with pytest.raises(ssl.SSLCertVerificationError), app.connection_for_read() as connection:
        connection.connect()
    monkeypatch.setenv("SSL_CERT_FILE", str(rabbitmq.certificate))
    assert office.waiting() >= 0
    assert office.issue(3) == 3
    assert office.waiting() >= 3
    office.close()
    with app.connection_for_read() as connection:
        connection.connect()


@pytest.mark.chaos
@pytest.mark.skipif("CHAOS" not in os.environ, reason="long: CHAOS=1 runs it")
@pytest.mark.timeout(600)
def test_faults_at_random_under_load(lab: TicketLab, rabbitmq: RabbitMq) -> None:
    """Kills of workers, kills of RabbitMQ and purges, 30 of them, while jobs keep coming."""
    dice = random.Random(int(os.environ.get("CHAOS_SEED", "1")))
    for worker in [lab.begin(slots=4) for _ in range(3)]:
        lab.await_ready(worker)
    ids: list[str] = []
    for _ in range(30):
        ids += lab.put(60, tenant=dice.choice("abcd"), steps=dice.randint(1, 30))
        fault = dice.choice(["kill", "kill", "restart", "purge", "drain"])
        if fault == "purge":
            rabbitmq.purge(TICKETS)
        elif fault == "restart":
            rabbitmq.kill()
            rabbitmq.start()
        else:
            alive = [worker for worker in lab.workers if worker.poll() is None]
            victim = dice.choice(alive)
            victim.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
            victim.wait(20)
            lab.start(slots=4)
    lab.await_end(ids, 120)
    failed = [job for job in lab.jobs(ids) if job.status is not Status.COMPLETED]
    assert all(job.error and job.error.code == "max_attempts" for job in failed)
    assert len(failed) < len(ids) / 100
    lab.assert_completed_once([job.id for job in lab.jobs(ids) if job not in failed])
