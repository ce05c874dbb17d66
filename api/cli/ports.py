"""Ports for the parts of a stack."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

#: Below the ports that the kernel gives to outgoing connections: between a port's choice and the
#: start of its server, seconds later, one of those could take it.
_PORTS = range(12_000, 32_000)
_TRIES = 20


class PortBusyError(Exception):
    """Something else listens there."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"port {port} on {host} can't be used: {reason}")


def claim_port(host: str, wanted: int) -> int:
    """`wanted` if it can be bound, or a free port for 0. Raises `PortBusyError`."""
    bound = _bind(host, wanted)
    if wanted:
        return bound
    for _ in range(_TRIES):
        with suppress(PortBusyError):
            return _bind(host, secrets.choice(_PORTS))
    return bound


def _bind(host: str, wanted: int) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            # As the servers do: a port in TIME_WAIT is free.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            return int(sock.getsockname()[1])
    except OSError as error:
        raise PortBusyError(host, wanted, error.strerror or str(error)) from None


def http_address(host: str, port: int) -> str:
    """How a client on this machine reaches a server that listens on `host`."""
    if host in ("", "0.0.0.0"):  # noqa: S104 - compares, binds nothing
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
