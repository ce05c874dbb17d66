"""Takes answers from where they are kept, or has them computed, once for all who ask.

For requests whose answer is always the same: embeddings, scores, and completions without chance in
them (`temperature` 0, or a `seed`). Jobs of one tenant that ask the same while it is computed wait
for that one, in this process or another. Whatever goes wrong with keeping, a job is computed.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import orjson
from pydantic import TypeAdapter

from broker.answers import CLAIM_MS, AnswerKey, Found
from broker.errors import BrokerError
from broker.jobs import Job
from config.catalogue import ModelSpec
from config.logs import get_logger
from workers.engine import EngineResult

log = get_logger(__name__)

#: Parts of a request that change nothing in what the engine makes of it.
_INDIFFERENT: Final = frozenset(
    {
        *("model", "stream", "stream_options", "encoding_format", "metadata", "user", "store"),
        *("top_n", "return_documents"),
    }
)
#: How often another process's answer is looked for (s).
_LOOK_EVERY_S: Final = 0.1
#: Pause after the broker couldn't be reached; meanwhile everything is computed (s).
_REST_S: Final = 5.0

_RESULT: Final = TypeAdapter(EngineResult)


class Answers(Protocol):
    """Where answers are kept; see `broker.answers.RedisAnswers`."""

    def find(self, key: AnswerKey, asker: str) -> Found: ...
    def keep(self, key: AnswerKey, asker: str, answer: bytes) -> None: ...
    def prolong(self, key: AnswerKey, asker: str) -> bool: ...
    def release(self, key: AnswerKey, asker: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    result: EngineResult
    #: `computed` for this job, `kept` from an earlier one, or `shared` with one that ran beside it.
    source: str
    #: It is kept: where, so that it can be erased with the job.
    name: str = ""


class Patience:
    """How long a job waits for another's answer: until its time is up, or it is to stop."""

    def __init__(self, until: float | None = None) -> None:
        """`until`: on the monotonic clock (s)."""
        self._until = until
        self._event = threading.Event()
        self._stopped = False
        self._given: Answer | None = None

    def stop(self) -> None:
        self._stopped = True
        self._event.set()

    def give(self, answer: Answer | None) -> None:
        """End the wait; None: there is no answer, the job has to look for itself."""
        self._given = answer
        self._event.set()

    def wait(self, within_s: float | None = None) -> Answer | None:
        """What was given, or None after `within_s`. Raises `ImpatientError` when it is over."""
        waits = [] if within_s is None else [within_s]
        if self._until is not None:
            waits.append(self._until - time.monotonic())
        self._event.wait(max(0.0, min(waits)) if waits else None)
        # Before looking: what comes from here on is heard by the next wait.
        self._event.clear()
        if self._stopped:
            raise ImpatientError(stopped=True)
        if self._given is None and self._until is not None and self._until <= time.monotonic():
            raise ImpatientError(stopped=False)
        return self._given


class ImpatientError(Exception):
    """A job waited for another's answer and must not any longer."""

    def __init__(self, *, stopped: bool) -> None:
        super().__init__()
        #: It was cancelled or lost; else its time is up.
        self.stopped = stopped


class AnswerDesk:
    """The answers of one model in one worker. Thread-safe."""

    def __init__(
        self, answers: Answers, spec: ModelSpec, *, fingerprint: str, max_bytes: int
    ) -> None:
        """`fingerprint`: of the model as it runs here; answers of another one don't count."""
        self._answers = answers
        self._always = spec.kind != "chat"
        self._temperature = spec.temperature
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        #: Who waits for each answer that this process computes or looks for.
        self._followed: dict[AnswerKey, list[Patience]] = {}
        self._claims: dict[AnswerKey, str] = {}
        self._waiting = 0
        self._resting_until = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._prolong, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that wait now for what another one computes."""
        return self._waiting

    def key(self, job: Job, body: dict[str, Any]) -> AnswerKey | None:
        """None: this request's answer is one of many, or isn't to be kept."""
        if job.no_store or not (self._always or self._without_chance(body)):
            return None
        said = {name: value for name, value in body.items() if name not in _INDIFFERENT}
        parts = [job.model, self._fingerprint, job.endpoint, said]
        digest = hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()
        return AnswerKey(job.tenant, digest)

    def _without_chance(self, body: dict[str, Any]) -> bool:
        temperature = body.get("temperature")
        if temperature is None:
            temperature = self._temperature
        return temperature == 0 or body.get("seed") is not None

    def answer(
        self, key: AnswerKey, asker: str, compute: Callable[[], EngineResult], patience: Patience
    ) -> Answer:
        """Raises what `compute` raises, or `ImpatientError`."""
        waited = False
        while True:
            with self._lock:
                followers = self._followed.get(key)
                if followers is None:
                    self._followed[key] = []
                    break
                followers.append(patience)
            waited = True
            with self._counted():
                given = patience.wait()
            if given is not None:
                return given
        answer = shared = None
        try:
            answer = self._lead(key, asker, compute, patience, waited)
            shared = Answer(_cached(answer.result), "shared", answer.name)
        finally:
            with self._lock:
                followers = self._followed.pop(key)
            for each in followers:
                each.give(shared)
        return answer

    def _lead(
        self,
        key: AnswerKey,
        asker: str,
        compute: Callable[[], EngineResult],
        patience: Patience,
        waited: bool,
    ) -> Answer:
        found = self._find(key, asker)
        if _elsewhere(found):
            waited = True
            with self._counted():
                while _elsewhere(found):
                    patience.wait(_LOOK_EVERY_S)
                    found = self._find(key, asker)
        if found is None:
            return Answer(compute(), "computed")
        if found.answer is not None:
            return self._read(key, found.answer, compute, "shared" if waited else "kept")
        with self._lock:
            self._claims[key] = asker
        try:
            result = compute()
            return Answer(result, "computed", self._keep(key, asker, result))
        except BaseException:
            self._drop(key, asker)
            raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    @staticmethod
    def _read(
        key: AnswerKey, content: bytes, compute: Callable[[], EngineResult], source: str
    ) -> Answer:
        try:
            return Answer(decoded(content), source, key.name)
        except ValueError:
            log.warning("kept_answer_unreadable")
            return Answer(compute(), "computed")

    def _find(self, key: AnswerKey, asker: str) -> Found | None:
        """None: the broker can't be asked."""
        if time.monotonic() < self._resting_until:
            return None
        try:
            return self._answers.find(key, asker)
        except BrokerError as error:
            self._rest(error)
            return None

    def _keep(self, key: AnswerKey, asker: str, result: EngineResult) -> str:
        content = encoded(result)
        if len(content) > self._max_bytes:
            self._drop(key, asker)
            return ""
        with self._lock:
            self._claims.pop(key, None)
        try:
            self._answers.keep(key, asker, content)
        except BrokerError as error:
            self._rest(error)
            return ""
        return key.name

    def _drop(self, key: AnswerKey, asker: str) -> None:
        with self._lock:
            self._claims.pop(key, None)
        try:
            self._answers.release(key, asker)
        except BrokerError as error:
            self._rest(error)  # the claim expires

    def _rest(self, error: BrokerError) -> None:
        if time.monotonic() >= self._resting_until:
            log.warning("answers_not_kept", reason=str(error), rest_s=_REST_S)
        self._resting_until = time.monotonic() + _REST_S

    def _prolong(self) -> None:
        while not self._stopping.wait(CLAIM_MS / 3000):
            with self._lock:
                claims = list(self._claims.items())
            for key, asker in claims:
                try:
                    self._answers.prolong(key, asker)
                except BrokerError as error:
                    self._rest(error)
                    break


def _elsewhere(found: Found | None) -> bool:
    """Another process computes it."""
    return found is not None and found.answer is None and not found.claimed


def encoded(result: EngineResult) -> bytes:
    """As it is kept."""
    plain = _RESULT.dump_python(replace(result, vectors=[]))
    return orjson.dumps([plain, [_packed(vector) for vector in result.vectors]])


def decoded(content: bytes) -> EngineResult:
    """Raises `ValueError` where it isn't one."""
    plain, packed = orjson.loads(content)
    vectors = [array(kind, base64.b64decode(each)).tolist() for kind, each in packed]
    return _cached(replace(_RESULT.validate_python(plain), vectors=vectors))


def _packed(vector: list[float]) -> tuple[str, str]:
    """Type code and base64 of its numbers: of 4 bytes where that loses nothing, as for models."""
    numbers = array("f", vector)
    if numbers.tolist() != vector:
        numbers = array("d", vector)
    return numbers.typecode, base64.b64encode(numbers.tobytes()).decode()


def _cached(result: EngineResult) -> EngineResult:
    """As a job gets it for which nothing was computed."""
    usage = replace(result.usage, cached_tokens=result.usage.input_tokens)
    return replace(result, usage=usage)
