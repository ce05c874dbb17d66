"""Publishes the text of streaming jobs: one broker call for all jobs of a step, never in its way.

Engines write into memory; one thread carries it to the broker, at most every `interval_s`, so that
broker round trips grow with steps and not with tokens × requests. While the broker is away the text
of running jobs waits here; what waits is bounded by what the running jobs may generate at all, and
it is dropped with the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from broker.errors import BrokerUnavailableError
from broker.jobs import Delta
from broker.queue import JobQueue
from config.logs import get_logger

log = get_logger(__name__)

#: Time in which the other requests of the same step join the first one.
_GATHER_S = 0.002
#: Pause after the broker could not be reached.
_RETRY_S = 0.25


class TextStream:
    """Text of one attempt on its way out."""

    __slots__ = ("_on_stale", "_publisher", "attempt", "job_id", "pending", "sent", "stale")

    def __init__(
        self,
        publisher: DeltaPublisher,
        job_id: str,
        attempt: int,
        on_stale: Callable[[], None],
    ) -> None:
        self._publisher = publisher
        self._on_stale = on_stale
        self.job_id = job_id
        self.attempt = attempt
        #: Written and not yet published; guarded by the publisher's lock.
        self.pending: list[str] = []
        #: Bytes (UTF-8) the broker is known to have; guarded by the publisher's publishing lock.
        self.sent = 0
        #: The broker said that this attempt no longer counts; its text is dropped.
        self.stale = False

    def write(self, text: str) -> None:
        """Take text from the engine's thread; returns at once."""
        self._publisher.enqueue(self, text)

    def flush(self) -> None:
        """Publish what waits, now and in the caller's thread. Raises what `emit` raises."""
        self._publisher.flush(self)

    def close(self) -> None:
        """Forget the stream and what was not published."""
        self._publisher.discard(self)

    def turn_stale(self) -> None:
        self.stale = True
        try:
            self._on_stale()
        except Exception:
            log.exception("stale_callback_failed", job_id=self.job_id)


class DeltaPublisher:
    """Owns the publishing thread."""

    def __init__(self, queue: JobQueue, queue_name: str, *, interval_s: float) -> None:
        self._queue = queue
        self._queue_name = queue_name
        self._interval_s = interval_s
        self._lock = threading.Lock()
        #: Held while a broker call is under way, so that pieces stay in order.
        self._publishing = threading.Lock()
        self._waiting: dict[TextStream, None] = {}
        #: The last call failed, which was logged.
        self._failing = False
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Publish what waits, as far as the broker can be reached, and end the thread."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def open(self, job_id: str, attempt: int, *, on_stale: Callable[[], None]) -> TextStream:
        """A stream for one attempt; `on_stale` is called when the broker refuses its text."""
        return TextStream(self, job_id, attempt, on_stale)

    # -- for TextStream ----------------------------------------------------------------------------
    def enqueue(self, stream: TextStream, text: str) -> None:
        with self._lock:
            if stream.stale:
                return
            stream.pending.append(text)
            self._waiting[stream] = None
        self._wake.set()

    def flush(self, stream: TextStream) -> None:
        with self._publishing:
            self._publish([stream])

    def discard(self, stream: TextStream) -> None:
        with self._lock:
            stream.stale = True
            stream.pending.clear()
            self._waiting.pop(stream, None)

    # -- the thread --------------------------------------------------------------------------------
    def _loop(self) -> None:
        next_at = 0.0
        while not self._stopping.is_set():
            self._wake.wait()
            self._stopping.wait(max(_GATHER_S, next_at - time.monotonic()))
            next_at = time.monotonic() + self._interval_s
            if not self._drain():
                self._stopping.wait(_RETRY_S)
        self._drain()

    def _drain(self) -> bool:
        """Publish all that waits; False when that failed and it still waits."""
        self._wake.clear()
        with self._publishing:
            with self._lock:
                streams = list(self._waiting)
            try:
                self._publish(streams)
            except Exception as error:
                # Whatever it is, the thread goes on: it is the only one, for all jobs.
                if not self._failing:
                    self._failing = True
                    away = isinstance(error, BrokerUnavailableError)
                    reason = str(error) if away else type(error).__name__
                    log.warning("deltas_delayed", jobs=len(streams), reason=reason)
                self._wake.set()
                return False
        self._failing = False
        return True

    def _publish(self, streams: list[TextStream]) -> None:
        """One broker call for the streams that have text; on failure the text is put back."""
        with self._lock:
            taken = [(stream, stream.pending) for stream in streams if stream.pending]
            for stream, _ in taken:
                stream.pending = []
                self._waiting.pop(stream, None)
        if not taken:
            return
        deltas = [
            # With its place in the text, a piece whose answer was lost may be sent again.
            Delta(
                job_id=stream.job_id,
                attempt=stream.attempt,
                text="".join(pieces),
                start=stream.sent,
            )
            for stream, pieces in taken
        ]
        try:
            refused = set(self._queue.emit(self._queue_name, deltas))
        except BaseException:
            with self._lock:
                for stream, pieces in taken:
                    if not stream.stale:
                        stream.pending[:0] = pieces
                        self._waiting[stream] = None
            raise
        for (stream, _), delta in zip(taken, deltas, strict=True):
            stream.sent += len(delta.text.encode(errors="replace"))
            if stream.job_id in refused and not stream.stale:
                stream.turn_stale()
