"""Where a webhook may go: the form of a URL, and which addresses count as public.

Checked twice: when a URL is given, and, for every address its name resolves to, at each attempt.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

MAX_URL = 2048

#: One spelling only. Userinfo, fragments, other schemes, escapes in the host, backslashes, blanks
#: and anything beyond ASCII have no place in it, so that no two parsers can read it differently.
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>/[!$&'()*+,;=:@A-Za-z0-9._~%/-]*)?"
    r"(?P<query>\?[!$&'()*+,;=:@A-Za-z0-9._~%/?-]*)?",
    re.ASCII,
)

#: Global unicast, the only IPv6 space that is routed; so loopback, unique local, link-local,
#: multicast, mapped (::ffff:0:0/96) and NAT64 (64:ff9b::/96) addresses are out.
_GLOBAL_SIX = IPv6Network("2000::/3")
#: Parts of it that lead elsewhere: protocol assignments with Teredo, documentation, 6to4.
_ODD_SIX = tuple(
    map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "2620:4f:8000::/48"))
)
#: Beside what `ipaddress` knows: protocol assignments, 6to4 relays, AMT, AS112, and the address at
#: which Azure's hosts answer for metadata.
_ODD_FOUR = tuple(
    map(
        IPv4Network,
        ("192.0.0.0/24", "192.88.99.0/24", "192.52.193.0/24", "192.31.196.0/24",
         "192.175.48.0/24", "168.63.129.16/32"),
    )
)  # fmt: skip
#: What a development setting opens.
_LOOPBACK = frozenset({IPv4Address("127.0.0.1"), IPv6Address("::1")})


class UrlError(ValueError):
    """A URL that no webhook is sent to; the message says why, without repeating it."""


def check_url(url: str, *, plain: bool = False, loopback: bool = False) -> None:
    """Raises `UrlError`. `plain` also lets http pass, `loopback` 127.0.0.1 and ::1."""
    if len(url) > MAX_URL:
        raise UrlError(f"it may have at most {MAX_URL} characters")
    found = _URL.fullmatch(url)
    if found is None:
        raise UrlError("it must be an https URL in its plain form, without user or fragment")
    if found["scheme"] != "https" and not plain:
        raise UrlError("it must begin with https://")
    if found["port"] and int(found["port"]) > 65535:
        raise UrlError("its port doesn't exist")
    host = found["six"] or found["host"]
    last = host.rsplit(".", 1)[-1]
    numeric = found["six"] is not None or last.isdigit() or last[:2].lower() == "0x"
    if not numeric:
        if host.lower() == "localhost" and not loopback:
            raise UrlError("its host isn't public")
        return
    try:
        # Takes four decimal numbers without leading zeros; resolvers also take 0x7f.1 and the like.
        address = ip_address(host)
    except ValueError:
        raise UrlError("its host is no address in its plain form") from None
    if not is_allowed(address, loopback=loopback):
        raise UrlError("its host isn't public")


def is_allowed(address: IPv4Address | IPv6Address, *, loopback: bool = False) -> bool:
    """Whether a webhook may be sent to this address."""
    if loopback and address in _LOOPBACK:
        return True
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _ODD_FOUR)
    if address.scope_id is not None or address not in _GLOBAL_SIX:
        return False
    return not any(address in network for network in _ODD_SIX)


def origin(url: str) -> str:
    """Scheme, host and port of a checked URL: what deliveries to single URLs are bounded by."""
    found = _URL.match(url)
    assert found is not None
    host = (found["six"] or found["host"]).lower()
    return f"{found['scheme']}://{host}:{found['port'] or ''}"
