"""When a delivery is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: A delay is up to this part of the planned one shorter or longer, so that what failed together
#: isn't repeated together.
JITTER = 0.1
#: Longest that a receiver can put off an attempt.
MAX_RETRY_AFTER_S = 86_400.0


def delay_s(
    plan: Sequence[float],
    failures: int,
    *,
    retry_after_s: float | None = None,
    draw: Callable[[], float] = random.random,
) -> float | None:
    """Seconds from the `failures`-th failed attempt to the next one; None when that was the last.

    `plan[n]` is the wait before attempt n + 1. A receiver's `Retry-After` makes it longer, never
    shorter.
    """
    if failures >= len(plan):
        return None
    planned = plan[failures] * (1 - JITTER + 2 * JITTER * draw())
    if retry_after_s is None:
        return planned
    return max(planned, min(retry_after_s, MAX_RETRY_AFTER_S))


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a `Retry-After` header (RFC 9110: seconds or a date); None: it says nothing."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
