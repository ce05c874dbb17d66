"""The way from the loop's tokens to the callers' answers, in a thread of its own.

An answer belongs to whoever has taken it out of the table: this thread when it is finished, the
engine when it is cancelled or lost. Nobody else ends it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from config.logs import get_logger
from workers.engine import EngineError
from workers.engines.answers import Answer
from workers.engines.batching import BatchingLoop

log = get_logger(__name__)


def name_of(request_id: str, number: int) -> str:
    """The engine's name of a request. A caller's id may come again while the first still ends."""
    return f"{request_id}#{number}"


class Delivery:
    """Answers on their way. Thread-safe."""

    def __init__(
        self, loop: Callable[[], BatchingLoop | None], on_success: Callable[[], None]
    ) -> None:
        """`loop` gives the one that runs now; `on_success` is called before an answer ends well."""
        self._loop = loop
        self._on_success = on_success
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        #: The engine's names of requests, by the caller's.
        self._names: dict[str, str] = {}
        self._inbox: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __len__(self) -> int:
        return len(self._answers)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when all that came before is delivered."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def put(self, outputs: list[Any]) -> None:
        """What a step brought."""
        self._inbox.put(outputs)

    # -- the table ---------------------------------------------------------------------------------
    def expect(self, name: str, answer: Answer) -> None:
        with self._lock:
            self._answers[name] = answer
            self._names[_request_id(name)] = name

    def take(self, name: str) -> Answer | None:
        """The answer, which from now on is the caller's to end."""
        with self._lock:
            self._names.pop(_request_id(name), None)
            return self._answers.pop(name, None)

    def take_of(self, request_id: str) -> tuple[str, Answer | None]:
        """As `take`, by the caller's id; with the engine's name of it."""
        with self._lock:
            name = self._names.pop(request_id, "")
            return name, self._answers.pop(name, None)

    def fail_all(self, error: Exception) -> None:
        with self._lock:
            answers = list(self._answers.values())
            self._answers.clear()
            self._names.clear()
        for answer in answers:
            answer.future.set_exception(error)

    # -- the thread --------------------------------------------------------------------------------
    def _run(self) -> None:
        while (outputs := self._inbox.get()) is not None:
            for output in outputs:
                try:
                    self._handle(output)
                except Exception as error:
                    # Its message could hold text of the answer.
                    log.error("answer_failed", error=type(error).__name__)
                    if (loop := self._loop()) is not None:
                        loop.cancel_request(output.request_id)
                    if (answer := self.take(output.request_id)) is not None:
                        answer.future.set_exception(error)

    def _handle(self, output: Any) -> None:
        name = output.request_id
        answer = self._answers.get(name)
        loop = self._loop()
        if answer is None or loop is None:
            return
        if output.error is not None:
            # With the whole loop dying the watchdog ends the request, as lost.
            if loop.accepts and self.take(name) is not None:
                failure = EngineError("internal_error", "the request failed")
                answer.future.set_exception(answer.refusal or failure)
            return
        if not output.is_finished():
            answer.take(output.generated_tokens)
            if not answer.stopped:
                return
            loop.cancel_request(name)
        # Taken last: an answer that fails here is still to be ended.
        result = answer.finish(output.generated_tokens, loop.cached.pop(name, 0))
        if self.take(name) is None:
            return
        self._on_success()
        answer.future.set_result(result)


def _request_id(name: str) -> str:
    return name.rpartition("#")[0]
