"""The lean reader of HTTP answers, on any split of its bytes."""

from __future__ import annotations

import pytest

from loadtests import nginx
from loadtests.waiting_clients import Answers

PLAIN = b"HTTP/1.1 202 Accepted\r\nContent-Length: 4\r\nServer: x\r\n\r\nabcd"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\nb\r\ndefghijklmn\r\n0\r\n\r\n"
)
EMPTY = b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_answers_on_one_connection(size: int) -> None:
    sent = PLAIN + CHUNKED + EMPTY + PLAIN
    answers = Answers()
    heads, bodies, body = [], [], b""
    for at in range(0, len(sent), size):
        for kind, value in answers.feed(sent[at : at + size]):
            if kind == "head":
                heads.append(value)
            elif kind == "body":
                body += value
            else:
                bodies.append(body)
                body = b""
    assert heads == [202, 200, 204, 202]
    assert bodies == [b"abcd", b"abcdefghijklmn", b"", b"abcd"]


def test_the_shipped_configuration_gets_other_addresses() -> None:
    text = nginx.render(nginx.CONFIG.read_text(), listen=1234, replicas=[1, 2, 3])
    assert "listen 127.0.0.1:1234 reuseport" in text
    assert [line.split()[1] for line in text.splitlines() if "server 127" in line] == [
        "127.0.0.1:1",
        "127.0.0.1:2",
        "127.0.0.1:3",
    ]
    with pytest.raises(ValueError, match="places"):
        nginx.render(text, listen=1, replicas=[1])
