"""Keeps webhooks away from addresses that aren't public (SSRF, DNS rebinding).

A name is resolved by us, once per attempt; every address it has must be public, and the socket goes
to one of these and nowhere else. Each socket's address is looked at once more when it is made, so
that a way around the resolver (a literal, another resolver) leads nowhere either.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from broker.webhooks.urls import is_allowed

#: Host → its addresses as text. Raises `OSError` when the name can't be resolved.
Lookup = Callable[[str], Awaitable[list[str]]]


class BlockedAddressError(OSError):
    """The name has an address that no webhook is sent to."""


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses or not at all."""

    def __init__(self, *, loopback: bool = False, lookup: Lookup | None = None) -> None:
        """`lookup` stands in for the system's resolver."""
        self._loopback = loopback
        self._system = ThreadedResolver()
        self._lookup = lookup or self._ask_system

    async def _ask_system(self, host: str) -> list[str]:
        found = await self._system.resolve(host, 0, family=socket.AF_UNSPEC)
        return [each["host"] for each in found]

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = [ip_address(text) for text in await self._lookup(host)]
        if not addresses:
            raise OSError("the name has no address")
        # One bad address spoils them all: which one is tried is not ours to choose.
        if not all(is_allowed(each, loopback=self._loopback) for each in addresses):
            raise BlockedAddressError("the name has an address that isn't public")
        return [
            ResolveResult(
                hostname=host,
                host=str(each),
                port=port,
                family=socket.AF_INET if each.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for each in addresses
        ]

    async def close(self) -> None:
        await self._system.close()


def socket_maker(*, loopback: bool = False) -> Callable[[Any], socket.socket]:
    """Makes sockets for public addresses only; for `aiohttp.TCPConnector(socket_factory=…)`."""

    def make(info: Any) -> socket.socket:
        family, kind, proto, _, address = info
        if not is_allowed(ip_address(address[0]), loopback=loopback):
            raise BlockedAddressError("the address isn't public")
        return socket.socket(family, kind, proto)

    return make
