"""The address of a Redis behind Sentinels: where they are, and what they call its primary."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

#: Where a Sentinel listens unless told otherwise.
_PORT = 26379
_SCHEMES = ("redis+sentinel", "rediss+sentinel")
_OPTIONS = frozenset({"sentinel_username", "sentinel_password", "ssl_ca_certs"})
FORM = "redis+sentinel://[user:password@]host[:port],host[:port]/service[/db]"


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """`redis+sentinel://[user:password@]host[:port],…/service[/db][?sentinel_password=…]`.

    With `rediss+sentinel://` both the Redis and the Sentinels are spoken to over TLS, checked
    against `?ssl_ca_certs=FILE` or the system's authorities.
    """

    sentinels: tuple[tuple[str, int], ...]
    #: The name under which the Sentinels know the primary.
    service: str
    db: int = 0
    tls: bool = False
    ca_certs: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    @classmethod
    def matches(cls, url: str) -> bool:
        return url.partition("://")[0] in _SCHEMES

    @classmethod
    def parse(cls, url: str) -> SentinelUrl:
        """Raises `ValueError` saying what is wrong, without the URL, which may hold a password."""
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        username, _, password = user.partition(":") if at else ("", "", "")
        path = parts.path.strip("/").split("/")
        if not path[0] or len(path) > 2:
            raise ValueError(f"the primary's name is missing: {FORM}")
        if len(path) == 2 and not path[1].isdecimal():
            raise ValueError(f"the database must be a number: {FORM}")
        options = dict(parse_qsl(parts.query))
        if unknown := options.keys() - _OPTIONS:
            raise ValueError(
                f"unknown option {min(unknown)!r}; it may have {', '.join(sorted(_OPTIONS))}"
            )
        return cls(
            sentinels=tuple(_address(each) for each in hosts.split(",")),
            service=unquote(path[0]),
            db=int(path[1]) if len(path) == 2 else 0,
            tls=parts.scheme == _SCHEMES[1],
            ca_certs=options.get("ssl_ca_certs"),
            username=unquote(username) or None,
            password=unquote(password) or None,
            sentinel_username=options.get("sentinel_username"),
            sentinel_password=options.get("sentinel_password"),
        )


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_PORT)
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"a Sentinel's address must be host or host:port: {FORM}")
    return host, int(port)
