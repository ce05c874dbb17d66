"""Ports for the parts of a stack."""

from __future__ import annotations

import socket


class PortBusyError(Exception):
    """Something else listens there."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"port {port} on {host} can't be used: {reason}")


def claim_port(host: str, wanted: int) -> int:
    """`wanted` if it can be bound, or a free port for 0. Raises `PortBusyError`."""
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
