"""Several answers to one request: begun, stopped and ended together.

The others begin when the first has its first token: by then the prompt is in the cache, and they
share it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from struct import pack

from broker.jobs import Usage
from workers.engine import Choice, EngineResult, RequestCancelledError

#: Begins the answer with a number. Calls the function, if there is one, once it has a token.
Begin = Callable[[int, Callable[[], None] | None], Future[EngineResult]]


def seed_of(seed: int | None, answer: int) -> int | None:
    """Of one of several answers; that of the first is the request's own."""
    if seed is None or answer == 0:
        return seed
    digest = hashlib.blake2b(pack("<qq", seed, answer), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Choices:
    """`count` answers. `stop` is called with the number of an answer that has to end."""

    def __init__(self, count: int, begin: Begin, stop: Callable[[int], None]) -> None:
        self.future: Future[EngineResult] = Future()
        self._begin = begin
        self._stop = stop
        self._lock = threading.Lock()
        self._results = [EngineResult(finish_reason="cancelled")] * count
        #: Answers that run or have not begun.
        self._left = set(range(count))
        self._begun = 0
        #: No more answers are begun.
        self._closed = False
        self._failure: Exception | None = None

    def start(self) -> None:
        """Begin the first. Raises what `begin` raises."""
        self._run(0, self._follow)

    def cancel(self) -> None:
        """End all of them."""
        self._close(RequestCancelledError(EngineResult()))

    def _run(self, number: int, on_first: Callable[[], None] | None) -> None:
        with self._lock:
            if self._closed:
                return
            self._begun = number + 1
        future = self._begin(number, on_first)
        future.add_done_callback(lambda ended: self._ended(number, ended))
        with self._lock:
            late = self._closed
        if late:
            self._stop(number)

    def _follow(self) -> None:
        for number in range(1, len(self._results)):
            try:
                self._run(number, None)
            except Exception as error:
                self._end(number)
                self._close(error)
                return

    def _ended(self, number: int, future: Future[EngineResult]) -> None:
        try:
            self._results[number] = future.result()
        except RequestCancelledError as stopped:
            self._results[number] = stopped.result
            self._close(stopped, by=number)
        except Exception as error:
            self._close(error, by=number)
        self._end(number)

    def _close(self, failure: Exception, *, by: int = -1) -> None:
        """Begin no more and end those that run, but for the one it is `by`.

        The first reason is the one told of.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._failure = failure
            running = [each for each in self._left if each < self._begun and each != by]
            waiting = [each for each in self._left if each >= self._begun]
        for number in running:
            self._stop(number)
        for number in waiting:
            self._end(number)

    def _end(self, number: int) -> None:
        with self._lock:
            if number not in self._left:
                return
            self._left.remove(number)
            if self._left:
                return
        whole = joined(self._results)
        if self._failure is None:
            self.future.set_result(whole)
        elif isinstance(self._failure, RequestCancelledError):
            self.future.set_exception(RequestCancelledError(whole))
        else:
            self.future.set_exception(self._failure)


def joined(results: Sequence[EngineResult]) -> EngineResult:
    """As one result. The prompt counts once."""
    first = results[0]
    others = [
        Choice(text=each.text, finish_reason=each.finish_reason, logprobs=each.logprobs)
        for each in results[1:]
    ]
    usage = Usage(
        input_tokens=first.usage.input_tokens,
        output_tokens=sum(each.usage.output_tokens for each in results),
        cached_tokens=first.usage.cached_tokens,
    )
    return EngineResult(
        text=first.text,
        finish_reason=first.finish_reason,
        logprobs=first.logprobs,
        others=tuple(others),
        usage=usage,
    )
