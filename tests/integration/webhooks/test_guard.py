"""No connection ever goes to an address that isn't public, however a name is made to lead there.

127.0.0.1 stands for the public internet (`loopback`); at 127.0.0.2, the inside, a trap listens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from tests.conftest import PATIENCE_S
from tests.webhooklab import Receiver, receiving
from workers.webhooks.guard import BlockedAddressError, PublicResolver, socket_maker
from workers.webhooks.sender import Sender

#: What names resolve to, at the first look and at each one after it.
Names = dict[str, list[list[str]]]


@pytest.fixture
async def trap() -> AsyncIterator[Receiver]:
    async with receiving("127.0.0.2") as made:
        yield made


@pytest.fixture
async def outside() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


def lookup_of(names: Names) -> tuple[Callable[..., object], dict[str, int]]:
    looks: dict[str, int] = {}

    async def lookup(host: str) -> list[str]:
        looks[host] = looks.get(host, 0) + 1
        answers = names[host]
        return answers[min(looks[host], len(answers)) - 1]

    return lookup, looks


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.2"],
        ["10.0.0.5"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["fd00::1"],
        ["::ffff:127.0.0.2"],
        ["64:ff9b::7f00:2"],
        ["127.0.0.1", "127.0.0.2"],
        ["127.0.0.1", "10.0.0.5"],
        ["8.8.8.8", "::1", "fe80::1"],
    ],
    ids=lambda each: "+".join(each),
)
async def test_names_that_lead_inside(trap: Receiver, addresses: list[str]) -> None:
    lookup, _ = lookup_of({"hook.example": [addresses]})
    port = trap.url.rsplit(":", 1)[1]
    async with Sender(timeout_s=PATIENCE_S, plain=True, loopback=True, lookup=lookup) as sender:
        answer = await sender.send(f"http://hook.example:{port}/", b"{}", {})
    assert (answer.status, answer.error) == (0, "address_blocked")
    assert trap.got == []


async def test_the_address_that_was_checked_is_the_one_connected_to(
    outside: Receiver, trap: Receiver
) -> None:
    """Rebinding: good at the first look, bad at the next."""
    lookup, looks = lookup_of({"hook.example": [["127.0.0.1"], ["127.0.0.2"]]})
    port = outside.url.rsplit(":", 1)[1]
    async with Sender(timeout_s=PATIENCE_S, plain=True, loopback=True, lookup=lookup) as sender:
        first = await sender.send(f"http://hook.example:{port}/", b"{}", {})
        assert looks == {"hook.example": 1}
        # The next attempt looks again, and no connection was kept.
        second = await sender.send(f"http://hook.example:{port}/", b"{}", {})
    assert (first.status, second.error) == (204, "address_blocked")
    assert (len(outside.got), trap.got) == (1, [])
    assert outside.got[0].headers["Host"] == f"hook.example:{port}"


async def test_literals_have_no_way_around(trap: Receiver) -> None:
    port = trap.url.rsplit(":", 1)[1]
    async with Sender(timeout_s=PATIENCE_S, plain=True, loopback=True) as sender:
        for host in ("127.0.0.2", "127.2", "2130706434", "0x7f000002", "[::ffff:127.0.0.2]"):
            answer = await sender.send(f"http://{host}:{port}/", b"{}", {})
            assert answer.error == "address_blocked", host
    assert trap.got == []


async def test_sockets_are_made_for_allowed_addresses_only() -> None:
    make = socket_maker()
    with pytest.raises(BlockedAddressError):
        make((2, 1, 6, "", ("127.0.0.1", 80)))
    make((2, 1, 6, "", ("8.8.8.8", 80))).close()
    with pytest.raises(BlockedAddressError):
        make((10, 1, 6, "", ("fd00::1", 80, 0, 0)))


async def test_without_the_setting_loopback_is_closed(outside: Receiver) -> None:
    async with Sender(timeout_s=PATIENCE_S, plain=True) as sender:
        for url in (outside.url, outside.url.replace("127.0.0.1", "localhost")):
            assert (await sender.send(url, b"{}", {})).error == "address_blocked"
    assert outside.got == []


async def test_outside_development_http_is_refused(outside: Receiver) -> None:
    async with Sender(timeout_s=PATIENCE_S, loopback=True) as sender:
        assert (await sender.send(outside.url, b"{}", {})).error == "address_blocked"
    assert outside.got == []


async def test_a_name_that_is_none(outside: Receiver) -> None:
    async def lookup(_: str) -> list[str]:
        raise OSError("no such name")

    async with Sender(timeout_s=PATIENCE_S, plain=True, loopback=True, lookup=lookup) as sender:
        answer = await sender.send("http://hook.example/", b"{}", {})
    assert answer.error == "name_not_resolved"
    resolver = PublicResolver(loopback=True)
    (found,) = await resolver.resolve("127.0.0.1", 80)
    assert (found["host"], found["port"]) == ("127.0.0.1", 80)
    await resolver.close()
