"""Kept answers: who computes one, how long it is kept, how many, and that it goes with its job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from broker.answers import CLAIM_MS, AnswerKey, RedisAnswers
from broker.connections import connect
from broker.errors import BrokerUnavailableError
from broker.jobs import NewJob, Outcome, Status, Usage
from broker.redis_queue import RedisQueue
from config.settings import Queue, Redis
from tests.conftest import free_port

KEY = AnswerKey("acme", "d1")


@pytest.fixture
def client(broker_url: str) -> Iterator[redis.Redis]:
    client = connect(Redis(url=SecretStr(broker_url)))
    yield client
    client.close()


@pytest.fixture
def answers(client: redis.Redis) -> RedisAnswers:
    return RedisAnswers(client, ttl_s=60, most=3)


def test_one_asker_computes_and_the_others_find(answers: RedisAnswers) -> None:
    assert answers.find(KEY, "a:1").claimed
    assert answers.find(KEY, "a:1").claimed  # the same again, after a lost reply
    assert answers.find(KEY, "b:1") == answers.find(KEY, "b:1")
    assert not answers.find(KEY, "b:1").claimed
    answers.keep(KEY, "a:1", b"forty-two")
    assert answers.find(KEY, "b:1").answer == b"forty-two"
    assert answers.find(AnswerKey("other", "d1"), "c:1").answer is None


def test_a_claim_is_given_up_or_prolonged_by_its_holder_alone(
    answers: RedisAnswers, client: redis.Redis
) -> None:
    answers.find(KEY, "a:1")
    answers.release(KEY, "b:1")
    assert not answers.prolong(KEY, "b:1")
    assert not answers.find(KEY, "b:1").claimed
    client.pexpire(KEY.claim, 50)
    assert answers.prolong(KEY, "a:1")
    assert client.pttl(KEY.claim) > CLAIM_MS / 2
    answers.release(KEY, "a:1")
    assert answers.find(KEY, "b:1").claimed
    answers.keep(KEY, "a:1", b"late")  # it was right all the same; the claim stays b's
    assert client.get(KEY.claim) == b"b:1"


def test_a_tenants_oldest_answers_go_first(answers: RedisAnswers, client: redis.Redis) -> None:
    for number in range(5):
        key = AnswerKey("acme", f"d{number}")
        answers.keep(key, "a:1", b"x")
        # Distinct expiry times: several answers may be kept within a millisecond.
        client.zincrby("fb:tenant:acme:answers", number - 10, key.name)
    answers.keep(AnswerKey("other", "d0"), "a:1", b"x")
    left = [n for n in range(5) if client.exists(AnswerKey("acme", f"d{n}").name)]
    assert left == [2, 3, 4]
    assert client.exists(AnswerKey("other", "d0").name)


def test_everything_expires(answers: RedisAnswers, client: redis.Redis) -> None:
    answers.find(KEY, "a:1")
    answers.keep(AnswerKey("acme", "d2"), "a:1", b"x")
    names = [name for name in client.keys("fb:*") if client.pttl(name) < 0]
    assert names == []


@pytest.mark.parametrize("erase_first", [False, True])
def test_an_erased_job_takes_its_answer_along(
    answers: RedisAnswers, client: redis.Redis, erase_first: bool
) -> None:
    queue = RedisQueue(client, Queue())
    job = NewJob(tenant="acme", model="m", endpoint="/v1/embeddings", body=b"{}", cost=9)
    queue.enqueue(job)
    (claim,) = queue.claim("m", "w", limit=1)
    if erase_first:
        queue.erase(job.id)
    answers.keep(KEY, "a:1", b"x")
    usage = Usage(input_tokens=5, cached_tokens=5)
    outcome = Outcome(
        status=Status.COMPLETED, output=b"{}", usage=usage, charged=0, answer=KEY.name
    )
    assert queue.complete(claim, outcome)
    assert queue.get(job.id).usage == usage
    if not erase_first:
        assert client.exists(KEY.name)
        queue.erase(job.id)
    assert not client.exists(KEY.name)


def test_without_a_broker_it_says_so() -> None:
    client = connect(Redis(url=SecretStr(f"redis://127.0.0.1:{free_port()}/0")))
    with pytest.raises(BrokerUnavailableError):
        RedisAnswers(client, ttl_s=60, most=3).find(KEY, "a:1")
    client.close()
