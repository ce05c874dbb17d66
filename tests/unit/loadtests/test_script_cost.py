"""The cost of scripts is read from a real server, and a round leaves the backlog as it was."""

from __future__ import annotations

import pytest
import redis

from broker.keys import base
from broker.redis_queue import RedisQueue
from config.settings import Queue
from loadtests import script_cost
from loadtests.script_cost import CostProbe
from loadtests.stack import MODEL


@pytest.mark.parametrize("tenants", [1, 20])
def test_a_round_costs_time_in_each_script_and_keeps_the_backlog(
    valkey: str, monkeypatch: pytest.MonkeyPatch, tenants: int
) -> None:
    monkeypatch.setattr(script_cost, "SAMPLE", 8)
    probe = CostProbe(valkey, tenants=tenants, backlog=40)
    with redis.Redis.from_url(valkey) as client:
        stats = RedisQueue(client, Queue()).stats(MODEL, top=100)
        assert (stats.depth, len(stats.top_tenants)) == (40, tenants)
        cost = probe.measure()
        stats = RedisQueue(client, Queue()).stats(MODEL)
        assert (stats.depth, stats.in_flight) == (40, 0)
        assert client.zcard(f"{base(MODEL)}l") == 0
    assert min(cost.enqueue_us, cost.claim_us, cost.complete_us) > 0
    assert cost.total_us == pytest.approx(cost.enqueue_us + cost.claim_us + cost.complete_us)
