"""Failed logins per address and per key prefix, counted in this process.

Beyond the limit an attempt that fails is told to wait and is no longer logged one by one. A good
credential always passes: behind a proxy all callers share an address, and whoever knows the prefix
of a key must not lock its owner out. What keeps keys from being guessed is their length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from api.auth import keys

_MINUTE_S: Final = 60.0
#: Addresses and prefixes remembered; the oldest are forgotten first.
_REMEMBERED: Final = 10_000


class Failures:
    """A minute's worth of failures may come at once; from then on, one per `60 / limit` s."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_s = _MINUTE_S / per_minute
        self._clock = clock
        #: Address or prefix -> when all its failures are forgiven.
        self._forgiven: dict[str, float] = {}

    def add(self, address: str | None, authorization: str | None) -> float:
        """Count one; the seconds that its caller has to wait, 0 when it is within the limit."""
        names = [f"address {address}"]
        if authorization is not None and (shown := _prefix(authorization)) is not None:
            names.append(f"prefix {shown}")
        return max(self._count(name) for name in names)

    def _count(self, name: str) -> float:
        now = self._clock()
        # At the end again: the order is that of the latest failure.
        forgiven = max(self._forgiven.pop(name, now), now)
        wait_s = forgiven + self._step_s - now - _MINUTE_S
        if wait_s <= 0:
            forgiven += self._step_s
        if len(self._forgiven) >= _REMEMBERED:
            del self._forgiven[next(iter(self._forgiven))]
        self._forgiven[name] = forgiven
        return max(wait_s, 0.0)


def _prefix(authorization: str) -> str | None:
    """What is shown of the key in a header, if it is one by its form."""
    key = authorization.rpartition(" ")[2]
    return keys.prefix(key) if keys.has_form(key) else None
