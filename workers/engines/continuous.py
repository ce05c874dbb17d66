"""Chat and completions: iteration-level batching on a paged KV cache, by transformers.

A short answer leaves the batch early and a new request joins at the next step. This module admits
requests, ends them on cancel, and rebuilds the loop when it has died; `delivery` turns what comes
out of the loop into answers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from config.catalogue import ModelSpec
from config.logs import get_logger
from config.settings import Models
from workers.admission import Generation, Limits, Sampling, admit_generation, admit_prompt
from workers.engine import (
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.engines import attention, decoder
from workers.engines.answers import Answer, OnPiece
from workers.engines.batching import STEP_MS, BatchingLoop, batching_config
from workers.engines.choices import Choices, seed_of
from workers.engines.delivery import Delivery, name_of
from workers.engines.kernels import native
from workers.engines.vocabulary import Vocabulary
from workers.loader import device, dtype_for, load_model, load_tokenizer
from workers.prompts import PromptBuilder
from workers.supervision import Pulse, Watchdog

log = get_logger(__name__)

#: The loop is rebuilt this often in a row without a finished request; then the process must go.
_MOST_LOSSES = 3
#: After running out of memory the loop is rebuilt with this part of it.
_SHRINK = 0.75
#: Longest wait for the cache of a new loop.
_CACHE_S = 30.0
#: Longest wait for a warm-up request.
_WARM_UP_S = 300.0


class ContinuousEngine:
    """One causal language model on one device."""

    name = "transformers"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        threads: int = 0,
        stall_s: float = 60.0,
        on_loaded: Callable[[], None] | None = None,
        step_ms: float = STEP_MS,
        kernel: native.Choice = "auto",
        models: Models | None = None,
        on_step: Callable[[int], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_dead: Callable[[], None] | None = None,
        on_kernel: Callable[[str], None] | None = None,
    ) -> None:
        self.capacity = spec.max_batch
        self._spec = spec
        self._folder = folder
        self._threads = threads or os.cpu_count() or 1
        self._on_loaded = on_loaded or (lambda: None)
        self._step_ms = step_ms
        self._kernel = kernel
        #: Beside these the compiled kernel is kept.
        self._models = models or Models()
        self._on_step = on_step or (lambda _: None)
        self._on_lost = on_lost or (lambda: None)
        self._on_dead = on_dead or (lambda: None)
        self._on_kernel = on_kernel or (lambda _: None)
        self._watchdog = Watchdog(self._pulse, self._revive, stall_s=stall_s)
        #: Held while the loop is replaced.
        self._lifecycle = threading.Lock()
        self._delivery = Delivery(lambda: self._loop, self._note_success)
        #: Requests for several answers, by the caller's names; an answer's name is `<name>/<n>`.
        self._choices: dict[str, Choices] = {}
        self._numbers = itertools.count(1)
        self._decoder: decoder.Decoder | None = None
        self._loop: BatchingLoop | None = None
        self._steps_before = 0
        self._losses = 0
        self._part = 1.0
        self._dead = False

    # -- the engine's contract ---------------------------------------------------------------------
    def start(self) -> None:
        where = device()
        self._model: Any = load_model(
            self._spec, self._folder, dtype=dtype_for(self._spec, where), where=where
        )
        self._own_attention = self._spec.attention == "auto" and attention.suits(self._model)
        if self._own_attention and decoder.suits(self._model):
            heads = decoder.heads_of(self._model)
            kernel = native.choose(self._kernel, self._models, heads)
            self._decoder = decoder.Decoder(self._model, kernel)
        tokenizer = load_tokenizer(self._folder)
        self._prompts = PromptBuilder(tokenizer)
        limits = Limits.of(self._spec, vocabulary=self._model.config.get_text_config().vocab_size)
        # Elsewhere tokens are drawn inside a CUDA graph, which knows no more than three numbers.
        on_cpu = where.type == "cpu"
        self._limits = replace(limits, shaping=on_cpu, steering=on_cpu)
        # Two threads that both compute in parallel make each other's wait asleep; the loop is the
        # one that may.
        torch.set_num_threads(1)
        self._delivery.start()
        self._loop = self._new_loop()
        self._ends = frozenset(_as_list(self._loop.generation_config.eos_token_id))
        self._vocabulary = Vocabulary(self._prompts.template, limits.vocabulary, self._ends)
        self._on_loaded()
        self._warm_up()
        self._measure()
        self._settle()
        self._watchdog.start()

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        prompt, param = self._prompts.prompt(request.endpoint, request.body)
        admit_prompt(prompt, self._limits, param=param)
        # A loop that is being rebuilt may hold less than the one before.
        with self._lifecycle:
            limits = self._limits
        generation = admit_generation(request.body, len(prompt), limits, param=param)
        if generation.choices > 1:
            return self._begin_several(request, prompt, generation)
        return self._begin(request.id, prompt, generation, _pieces_of(request, 0))

    def cancel(self, request_id: str) -> None:
        if (choices := self._choices.get(request_id)) is not None:
            choices.cancel()
            return
        loop = self._loop
        name, answer = self._delivery.take_of(request_id)
        if answer is None:
            return
        generated: list[int] = []
        cached = 0
        if loop is not None:
            generated, cached = loop.generated(name), loop.cached.pop(name, 0)
            loop.cancel_request(name)
        try:
            result = answer.cut(generated, cached)
        except Exception as error:
            # Nobody else ends this answer any more.
            log.error("answer_not_cut", error=type(error).__name__)
            result = EngineResult(finish_reason="cancelled")
        answer.future.set_exception(RequestCancelledError(result))

    @property
    def steps(self) -> int:
        loop = self._loop
        return self._steps_before + (loop.steps if loop is not None else 0)

    @property
    def alive(self) -> bool:
        return not self._dead and self._loop is not None

    def stop(self) -> None:
        self._watchdog.stop()
        with self._lifecycle:
            if self._loop is not None:
                self._loop.abandon()
                self._loop.join(0.0, timeout=5.0)
        self._delivery.fail_all(EngineLostError("the engine has stopped"))
        self._delivery.stop()

    # -- requests ----------------------------------------------------------------------------------
    def _begin(
        self,
        request_id: str,
        prompt: list[int],
        generation: Generation,
        on_piece: OnPiece | None = None,
        on_first: Callable[[], None] | None = None,
    ) -> Future[EngineResult]:
        answer = Answer(
            prompt=prompt,
            generation=generation,
            tokenizer=self._prompts.template,
            vocabulary=self._vocabulary,
            end_tokens=self._ends,
            on_piece=on_piece,
            on_first=on_first,
        )
        name = name_of(request_id, next(self._numbers))
        with self._lifecycle:
            loop = self._loop
            if loop is None or self._dead:
                raise EngineLostError("the engine has stopped")
            self._delivery.expect(name, answer)
            try:
                accepted = loop.add(
                    name,
                    prompt,
                    max_tokens=generation.max_tokens,
                    sampling=generation.sampling,
                    progress=answer.progress,
                    every_token=answer.every_token,
                )
            except BaseException:
                self._delivery.take(name)
                raise
        if not accepted:
            # The loop has just died; the watchdog will say so to the others.
            self._delivery.take(name)
            raise EngineLostError("the engine was lost")
        return answer.future

    def _begin_several(
        self, request: EngineRequest, prompt: list[int], generation: Generation
    ) -> Future[EngineResult]:
        def begin(number: int, on_first: Callable[[], None] | None) -> Future[EngineResult]:
            seed = seed_of(generation.sampling.seed, number)
            own = replace(generation, sampling=replace(generation.sampling, seed=seed))
            name = f"{request.id}/{number}"
            return self._begin(name, prompt, own, _pieces_of(request, number), on_first)

        choices = Choices(
            generation.choices, begin, lambda number: self.cancel(f"{request.id}/{number}")
        )
        self._choices[request.id] = choices
        choices.future.add_done_callback(lambda _: self._choices.pop(request.id, None))
        try:
            choices.start()
        except BaseException:
            self._choices.pop(request.id, None)
            raise
        return choices.future

    # -- the loop's life ---------------------------------------------------------------------------
    def _new_loop(self) -> BatchingLoop:
        loop = BatchingLoop(
            self._model,
            batching_config(self._spec, self._model.device, part=self._part),
            deliver=self._delivery.put,
            on_step=self._on_step,
            threads=self._threads,
            own_attention=self._own_attention,
            decoder=self._decoder,
            step_ms=self._step_ms,
        )
        loop.start()
        return loop

    def _settle(self) -> None:
        """Tell what computes the steps; the model's weights go where the decoder has its own."""
        assert self._loop is not None
        forward = "reference"
        if self._decoder is not None and self._loop.own_forward:
            self._decoder.release(self._model)
            forward = self._decoder.kernel
        attended = "own" if self._own_attention else "reference"
        log.info("attention_chosen", model=self._spec.name, attention=attended, forward=forward)
        self._on_kernel(forward)

    def _note_success(self) -> None:
        self._losses = 0

    def _warm_up(self) -> None:
        """The first steps of each kind cost seconds; nobody's request shall pay them."""
        prompt = [token % self._limits.vocabulary for token in range(3, 51)]
        for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, top_p=0.9)):
            generation = Generation(max_tokens=4, sampling=sampling, stop=())
            self._begin("warm-up", prompt, generation).result(timeout=_WARM_UP_S)

    def _measure(self) -> None:
        """Admission by the cache as it was really made."""
        assert self._loop is not None
        if held := self._loop.await_cache(_CACHE_S):
            self._limits = replace(self._limits, cache_tokens=held)

    def _pulse(self) -> Pulse:
        loop = self._loop
        return Pulse(
            alive=loop is not None and loop.accepts,
            running=len(self._delivery),
            steps=self.steps,
        )

    def _revive(self, reason: str) -> None:
        """Called by the watchdog: end the requests of a dead loop as lost, and start a new one."""
        if self._dead:
            return
        with self._lifecycle:
            old = self._loop
            assert old is not None
            failure = old.failure
            log.error(
                "engine_lost",
                model=self._spec.name,
                reason=reason,
                error=type(failure).__name__ if failure else "",
                requests=len(self._delivery),
            )
            self._on_lost()
            self._losses += 1
            if isinstance(failure, torch.OutOfMemoryError | MemoryError):
                self._part *= _SHRINK
            old.abandon()
            old.join(0.0, timeout=1.0)
            stuck = old.is_running()
            self._steps_before += old.steps
            self._delivery.fail_all(EngineLostError("the engine was lost"))
            # A thread stuck inside the model can't be ended, and two can't share it.
            self._dead = stuck or self._losses >= _MOST_LOSSES
            if not self._dead:
                del old
                self._loop = None
                try:
                    self._loop = self._new_loop()
                    self._measure()
                except Exception:
                    log.exception("engine_not_rebuilt", model=self._spec.name)
                    self._dead = True
        if self._dead:
            self._on_dead()


def _pieces_of(request: EngineRequest, number: int) -> OnPiece | None:
    """Where the pieces of one answer to a request go; nowhere when nobody reads along."""
    on_piece, on_text = request.on_piece, request.on_text
    if on_piece is not None:
        return lambda text, logprobs: on_piece(number, text, logprobs)
    if on_text is not None:
        return lambda text, _: on_text(text)
    return None


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
