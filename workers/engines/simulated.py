"""An engine without a model: it spends the time a stated model of step times says, and no more.

For load tests and for development without torch. Its text, its vectors and its name say
`simulated`; its figures say nothing about a real model.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from broker.jobs import Usage
from config.catalogue import ModelSpec
from config.settings import Simulated
from workers.admission import Generation, Limits, admit_generation, admit_prompt
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.engines.stopping import StopScanner

#: Answer length when the request names no `max_tokens`.
DEFAULT_TOKENS = 64
#: Numbers in a simulated vector.
DIMENSIONS = 64

_TEXT = (
    "simulated water rests behind the gate until the turbine asks for it and then a measured "
    "flow runs down the race while the pool stays calm"
)
_WORDS = _TEXT.split(" ")


@dataclass(eq=False, slots=True)
class _Running:
    request: EngineRequest
    future: Future[EngineResult]
    prompt_tokens: int
    generation: Generation
    #: The answer, token by token.
    pieces: list[str]
    scanner: StopScanner
    done: int = 0
    text: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def cache_tokens(self) -> int:
        return self.prompt_tokens + self.generation.max_tokens


class SimulatedEngine:
    """Chat, completions and embeddings on the step-time model of `config.settings.Simulated`."""

    name = "simulated"

    def __init__(
        self,
        spec: ModelSpec,
        settings: Simulated,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self._spec = spec
        self._settings = settings
        self._on_step = on_step
        self.capacity = settings.capacity or spec.max_batch
        # It has no scores, and only one thing to say.
        self._limits = replace(Limits.of(spec), steering=False, choices=1)
        #: Without any time to spend there is nothing to wait for, so nothing needs a thread.
        self._instant = not (
            settings.step_ms or settings.step_ms_per_sequence or settings.prefill_ms_per_token
        )
        self._changed = threading.Condition()
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._steps = 0
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- the engine's contract ---------------------------------------------------------------------
    def start(self) -> None:
        if not self._instant:
            self._thread = threading.Thread(target=self._loop, name="simulated-engine", daemon=True)
            self._thread.start()

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        job = self._admit(request)
        if self._instant:
            self._steps += 1
            while not job.future.done():
                self._advance(job)
            return job.future
        with self._changed:
            if self._stopping:
                raise EngineLostError("the engine has stopped")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def cancel(self, request_id: str) -> None:
        with self._changed:
            for job in (*self._waiting, *self._running):
                if job.request.id == request_id:
                    job.cancelled = True
            self._changed.notify()

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def alive(self) -> bool:
        return self._instant or (self._thread is not None and self._thread.is_alive())

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # -- admission ---------------------------------------------------------------------------------
    def _admit(self, request: EngineRequest) -> _Running:
        body = request.body
        if request.endpoint == "/v1/embeddings":
            return self._admit_embeddings(request)
        if self._spec.kind != "chat":
            # A made-up verdict could be taken for one.
            raise EngineError(
                "invalid_request", "the simulated engine gives no verdicts", param="model"
            )
        param = "messages" if "messages" in body else "prompt"
        content = _content(body, param)
        prompt_tokens = _count(content) + 4 * len(body.get("messages", ()))
        admit_prompt(range(min(prompt_tokens, 1)), self._limits, param=param)
        generation = admit_generation(body, prompt_tokens, self._limits, param=param)
        length = generation.max_tokens
        if "max_tokens" not in body:
            length = min(length, DEFAULT_TOKENS)
        seed = zlib.crc32(content.encode()) % len(_WORDS) if isinstance(content, str) else 0
        return _Running(
            request=request,
            future=Future(),
            prompt_tokens=prompt_tokens,
            generation=generation,
            pieces=_answer(seed, length),
            scanner=StopScanner(generation.stop),
        )

    def _admit_embeddings(self, request: EngineRequest) -> _Running:
        inputs = request.body["input"]
        counts = [_count(item) for item in inputs]
        for index, count in enumerate(counts):
            if count == 0:
                raise EngineError("invalid_request", f"input {index} is empty", "input")
            if count > self._limits.context_tokens:
                raise EngineError(
                    "context_length_exceeded",
                    f"input {index} has {count} tokens; the model takes"
                    f" {self._limits.context_tokens}",
                    "input",
                )
        generation = admit_generation({"max_tokens": 1}, 0, self._limits, param="input")
        return _Running(
            request=request,
            future=Future(),
            prompt_tokens=sum(counts),
            generation=generation,
            pieces=[],
            scanner=StopScanner(()),
        )

    # -- the loop ----------------------------------------------------------------------------------
    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or self._running)
                if self._stopping:
                    break
                new_tokens = self._schedule()
                batch = list(self._running)
            if batch:
                self._spend(len(batch), new_tokens)
                self._step(batch)
        for job in (*self._running, *self._waiting):
            job.future.set_exception(EngineLostError("the engine has stopped"))

    def _schedule(self) -> int:
        """Let cancelled requests go and waiting ones in; returns the prompt tokens to prefill."""
        for job in [job for job in (*self._waiting, *self._running) if job.cancelled]:
            (self._running if job in self._running else self._waiting).remove(job)
            job.future.set_exception(RequestCancelledError(self._result(job, "cancelled")))
        new_tokens = 0
        held = sum(job.cache_tokens for job in self._running)
        while self._waiting and len(self._running) < self.capacity:
            held += self._waiting[0].cache_tokens
            if self._limits.cache_tokens and held > self._limits.cache_tokens:
                break
            job = self._waiting.popleft()
            new_tokens += job.prompt_tokens
            self._running.append(job)
        return new_tokens

    def _spend(self, running: int, new_tokens: int) -> None:
        settings = self._settings
        milliseconds = (
            settings.step_ms
            + settings.step_ms_per_sequence * running
            + settings.prefill_ms_per_token * new_tokens
        )
        time.sleep(milliseconds / 1000)

    def _step(self, batch: list[_Running]) -> None:
        for job in batch:
            self._advance(job)
        with self._changed:
            self._running = [job for job in self._running if not job.future.done()]
        self._steps += 1
        if self._on_step is not None:
            self._on_step(len(batch))

    def _advance(self, job: _Running) -> None:
        """Give a request its next token and end it when it has all."""
        if job.done < len(job.pieces):
            self._show(job, job.scanner.push(job.pieces[job.done]))
            job.done += 1
        if job.scanner.stopped:
            job.future.set_result(self._result(job, "stop"))
        elif job.done == len(job.pieces):
            self._show(job, job.scanner.finish())
            natural = "max_tokens" not in job.request.body
            job.future.set_result(self._result(job, "stop" if natural else "length"))

    @staticmethod
    def _show(job: _Running, text: str) -> None:
        if text:
            job.text.append(text)
            if job.request.on_text is not None:
                job.request.on_text(text)

    def _result(self, job: _Running, reason: Any) -> EngineResult:
        vectors = []
        if job.request.endpoint == "/v1/embeddings" and reason != "cancelled":
            vectors = [_vector(item) for item in job.request.body["input"]]
        return EngineResult(
            text="".join(job.text),
            finish_reason=reason,
            vectors=vectors,
            usage=Usage(input_tokens=job.prompt_tokens, output_tokens=job.done),
        )


def _content(body: dict[str, Any], param: str) -> str | list[int]:
    if param == "messages":
        return "\n".join(message.get("content") or "" for message in body["messages"])
    prompt: str | list[int] = body["prompt"]
    return prompt


def _count(content: str | list[int]) -> int:
    """Tokens a text stands for: four UTF-8 bytes each, rounded up."""
    return -(-len(content.encode()) // 4) if isinstance(content, str) else len(content)


@lru_cache(maxsize=256)
def _answer(seed: int, length: int) -> list[str]:
    """`length` tokens that begin with the word `simulated`; shared, so not to be changed."""
    words = (_WORDS[(seed + index) % len(_WORDS)] for index in range(1, length))
    return ["simulated", *(f" {word}" for word in words)]


def _vector(item: str | list[int]) -> list[float]:
    """A unit vector that depends on nothing but the input."""
    draw = random.Random(str(item))  # noqa: S311 - pseudo-random on purpose
    values = [draw.gauss(0, 1) for _ in range(DIMENSIONS)]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]
