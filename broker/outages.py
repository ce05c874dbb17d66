"""Says once that the queue can't be used, and once that it can again."""

from __future__ import annotations

from time import monotonic

from config.logs import get_logger

log = get_logger(__name__)

#: An outage is over when a call succeeds and none has failed for this long (s). Redis without
#: memory refuses only some calls, and those between them prove nothing.
QUIET_S = 2.0


class OutageLog:
    """For one event loop, or under a lock."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._failed = 0
        self._reasons: set[str] = set()

    @property
    def open(self) -> bool:
        """Calls have failed and the end wasn't told yet."""
        return self._failed > 0

    def failed(self, reason: str) -> None:
        self._last = monotonic()
        if not self._failed:
            self._began = self._last
        self._failed += 1
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("queue_unavailable", reason=reason)

    def worked(self) -> None:
        now = monotonic()
        if self._failed and now - self._last >= QUIET_S:
            log.info("queue_available", outage_s=round(now - self._began, 1), failed=self._failed)
            self._failed = 0
            self._reasons.clear()
