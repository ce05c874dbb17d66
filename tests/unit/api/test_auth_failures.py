"""Failed logins: so many a minute per address and per key prefix, then 429."""

from __future__ import annotations

from api.auth import keys
from api.auth.failures import Failures
from tests.apiserver import Api


def test_a_minutes_worth_at_once_then_one_per_step() -> None:
    now = [0.0]
    failures = Failures(6, clock=lambda: now[0])
    assert [failures.add("1.2.3.4", "x") for _ in range(7)] == [0.0] * 6 + [10.0]
    assert failures.add("5.6.7.8", "x") == 0.0
    now[0] = 10.0
    assert failures.add("1.2.3.4", "x") == 0.0
    assert failures.add("1.2.3.4", "x") == 10.0


def test_one_key_from_many_addresses() -> None:
    failures = Failures(2, clock=lambda: 0.0)
    key = keys.generate("live").text
    guess = key[:-6] + "000000"
    waits = [
        failures.add(f"1.1.1.{n}", f"Bearer {each}") for n, each in enumerate((key, guess, guess))
    ]
    assert waits == [0.0, 0.0, 30.0]
    assert key not in repr(vars(failures))


def test_memory_is_bounded() -> None:
    failures = Failures(1, clock=lambda: 0.0)
    for number in range(10_050):
        failures.add(str(number), None)
    assert len(failures._forgiven) == 10_000
    assert failures.add("10049", None) > 0


async def test_who_fails_too_often_waits_and_a_good_key_passes(api: Api) -> None:
    bad = {"Authorization": "Bearer wrong"}
    seen = [await api.client.get("/v1/models", headers=bad) for _ in range(61)]
    assert {response.status for response in seen[:60]} == {401}
    assert seen[60].status == 429
    assert (await seen[60].json())["error"]["code"] == "authentication_limited"
    assert int(seen[60].headers["Retry-After"]) >= 1
    assert seen[60].headers["x-should-retry"] == "false"
    assert (await api.client.get("/v1/models")).status == 200
