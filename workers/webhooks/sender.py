"""One attempt: one POST, of exactly the bytes that were signed."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import aiohttp
from yarl import URL

from broker.webhooks.schedule import retry_after
from broker.webhooks.urls import UrlError, check_url
from workers.webhooks.guard import BlockedAddressError, Lookup, PublicResolver, socket_maker


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How an attempt ended."""

    duration_ms: int
    #: HTTP status; 0 when there was no answer.
    status: int = 0
    #: Empty when it succeeded.
    error: str = ""
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        return self.status == 410


class Sender:
    """An HTTP client for strangers' servers. To be entered with `async with`.

    No redirects, cookies, proxies or kept connections; of an answer only its head is read.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        plain: bool = False,
        loopback: bool = False,
        lookup: Lookup | None = None,
    ) -> None:
        """`plain` lets http pass, `loopback` 127.0.0.1 and ::1."""
        self._plain = plain
        self._loopback = loopback
        self._lookup = lookup
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Sender:
        connector = aiohttp.TCPConnector(
            resolver=PublicResolver(loopback=self._loopback, lookup=self._lookup),
            socket_factory=socket_maker(loopback=self._loopback),
            # Bounded by the schedule.
            limit=0,
            # Each attempt resolves and connects anew: what was public may not be so any more.
            use_dns_cache=False,
            force_close=True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("Accept", "Accept-Encoding"),
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Never raises for what the receiver does, or what its URL is."""
        began = time.monotonic()
        status, error, wait_s = 0, "", None
        try:
            check_url(url, plain=self._plain, loopback=self._loopback)
            status, wait_s = await self._post(url, body, headers)
            if not 200 <= status < 300:
                error = "redirected" if 300 <= status < 400 else "http_status"
        except UrlError:
            error = "address_blocked"
        except TimeoutError:
            error = "timeout"
        except (aiohttp.ClientError, OSError, ssl.SSLError, ValueError) as failure:
            error = _reason(failure)
        duration_ms = round((time.monotonic() - began) * 1000)
        return Answer(duration_ms=duration_ms, status=status, error=error, retry_after_s=wait_s)

    async def _post(
        self, url: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, float | None]:
        assert self._session is not None
        async with self._session.post(
            URL(url, encoded=True), data=body, headers=headers, allow_redirects=False
        ) as response:
            found = response.status, retry_after(response.headers.get("Retry-After"))
            # The rest of it is nobody's business; the connection isn't used again.
            response.close()
            return found


def _reason(failure: BaseException) -> str:
    """A stable word for what went wrong; messages may hold addresses."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, BlockedAddressError):
            return "address_blocked"
        causes = getattr(seen, "exceptions", ())
        if any(isinstance(each, BlockedAddressError) for each in causes):
            return "address_blocked"
        seen = getattr(seen, "os_error", None) or seen.__cause__
    if isinstance(failure, aiohttp.ClientConnectorDNSError):
        return "name_not_resolved"
    if isinstance(failure, (aiohttp.ClientSSLError, ssl.SSLError)):
        return "tls_failed"
    if isinstance(failure, (aiohttp.ServerDisconnectedError, ConnectionResetError)):
        return "connection_lost"
    if isinstance(failure, aiohttp.ClientOSError):
        return "connection_failed"
    return "bad_answer"
