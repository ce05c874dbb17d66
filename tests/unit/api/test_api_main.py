"""The listening socket of an API process."""

from __future__ import annotations

import socket

import pytest

from api.__main__ import bind


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such bound")
def test_every_connection_is_bound_to_take_what_it_is_sent() -> None:
    with bind("127.0.0.1", 0, write_timeout_s=1.5) as listening:
        listening.listen()
        with (
            socket.create_connection(listening.getsockname()),
            listening.accept()[0] as accepted,
        ):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
