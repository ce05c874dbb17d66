"""Sentence embeddings: a micro-batcher over an encoder, pooled as sentence-transformers does.

Inputs of all waiting requests are cut into batches of similar length, so that little is padded.
While a batch is computed the next one gathers by itself; only under load is a moment waited for
more company.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from broker.jobs import Usage
from config.catalogue import ModelSpec
from config.logs import get_logger
from workers.admission import Limits, admit_prompt
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.engines.bucketing import Piece, WaitingInputs, next_batch
from workers.engines.pooling import Pooling
from workers.loader import device, dtype_for, load_model, load_tokenizer
from workers.prompts import PromptBuilder
from workers.supervision import Pulse, Watchdog

log = get_logger(__name__)

#: Tokens of one batch, padding included.
BATCH_TOKENS = 8192
#: Longest wait for company while several requests are about.
MAX_WAIT_S = 0.002
#: Longest wait for the batch under way at the end.
_STOP_S = 5.0
#: Reduced precision is used only when its vectors are at least this near to float32's (cosine).
LEAST_COSINE = 0.999

_SAMPLES = (
    "The forebay is the pool where water waits before it enters the turbines.",
    "Ein kurzer Satz.",
    "How do I reset my password when I no longer have access to the e-mail address I used?",
    "SELECT id FROM jobs WHERE status = 'queued' ORDER BY created_ms LIMIT 10;",
)


class EmbeddingEngine:
    """One encoder on one device."""

    name = "transformers"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        threads: int = 0,
        stall_s: float = 60.0,
        on_loaded: Callable[[], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_dead: Callable[[], None] | None = None,
    ) -> None:
        self.capacity = spec.max_batch
        self._spec = spec
        self._folder = folder
        self._threads = threads or os.cpu_count() or 1
        self._on_loaded = on_loaded or (lambda: None)
        self._on_step = on_step or (lambda _: None)
        self._on_lost = on_lost or (lambda: None)
        self._on_dead = on_dead or (lambda: None)
        self._watchdog = Watchdog(self._pulse, self._give_up, stall_s=stall_s)
        self._changed = threading.Condition()
        #: Requests with inputs that are in no batch yet; the oldest first.
        self._waiting: deque[WaitingInputs] = deque()
        self._running: dict[str, WaitingInputs] = {}
        self._thread = threading.Thread(target=self._loop, name="embedding-engine", daemon=True)
        self._batch_tokens = BATCH_TOKENS
        self._company = False
        self._steps = 0
        self._stopping = False
        self._dead = False

    # -- the engine's contract ---------------------------------------------------------------------
    def start(self) -> None:
        self._device = device()
        prompts = PromptBuilder(load_tokenizer(self._folder))
        self._encode = prompts.text
        self._before, self._after = _surroundings(prompts)
        self._pooling = Pooling.of(self._folder)
        self._model: Any = self._load()
        self._limits = Limits(
            context_tokens=min(self._spec.context_tokens, self._pooling.max_tokens),
            output_tokens=1,
            vocabulary=self._model.config.vocab_size,
        )
        self._on_loaded()
        # Only the engine's thread computes in parallel.
        torch.set_num_threads(1)
        self._thread.start()
        warm = {"input": list(_SAMPLES) * 4}
        self.submit(EngineRequest(id="warm-up", endpoint="", body=warm)).result()
        self._watchdog.start()

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        waiting = WaitingInputs(request.id, self._tokens(request.body["input"]))
        with self._changed:
            if self._stopping or self._dead:
                raise EngineLostError("the engine has stopped")
            self._waiting.append(waiting)
            self._running[request.id] = waiting
            self._changed.notify()
        return waiting.future

    def cancel(self, request_id: str) -> None:
        with self._changed:
            waiting = self._running.pop(request_id, None)
            if waiting is None:
                return
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        waiting.future.set_exception(
            RequestCancelledError(EngineResult(finish_reason="cancelled", usage=_usage(waiting)))
        )

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def alive(self) -> bool:
        return not self._dead and self._thread.is_alive()

    def stop(self) -> None:
        self._watchdog.stop()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        self._end(list(self._running.values()), EngineLostError("the engine has stopped"))

    # -- admission ---------------------------------------------------------------------------------
    def _tokens(self, inputs: list[Any]) -> list[list[int]]:
        """Token ids of each input with the marks the model was trained with. Never truncates."""
        tokenised = []
        for index, item in enumerate(inputs):
            inner: list[int] = self._encode(item) if isinstance(item, str) else item
            admit_prompt(inner, self._limits, param="input")
            tokens = [*self._before, *inner, *self._after]
            if len(tokens) > self._limits.context_tokens:
                raise EngineError(
                    "context_length_exceeded",
                    f"input {index} has {len(tokens)} tokens; the model takes"
                    f" {self._limits.context_tokens}",
                    "input",
                )
            tokenised.append(tokens)
        return tokenised

    # -- the loop ----------------------------------------------------------------------------------
    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting)
                if self._stopping:
                    return
                if self._company:
                    self._await_company()
                batch = next_batch(self._waiting, self._batch_tokens)
            if batch:
                self._run(batch)

    def _await_company(self) -> None:
        deadline = time.monotonic() + MAX_WAIT_S
        while (left := deadline - time.monotonic()) > 0 and not self._stopping:
            if sum(waiting.open_tokens for waiting in self._waiting) >= self._batch_tokens:
                return
            self._changed.wait(left)

    def _run(self, batch: list[Piece]) -> None:
        try:
            vectors = self._embed(self._model, [piece.tokens for piece in batch])
        except (torch.OutOfMemoryError, MemoryError):
            self._batch_tokens = max(self._limits.context_tokens, self._batch_tokens // 2)
            log.warning("embedding_batch_shrunk", tokens=self._batch_tokens, inputs=len(batch))
            if len(batch) > 1:
                middle = len(batch) // 2
                self._run(batch[:middle])
                self._run(batch[middle:])
            else:
                self._end([batch[0].owner], EngineError("out_of_memory", "the input is too large"))
            return
        except Exception as error:
            # Its message could hold text of the inputs.
            log.error("embedding_batch_failed", inputs=len(batch), error=type(error).__name__)
            self._end([piece.owner for piece in batch], error)
            return
        owners = {piece.owner for piece in batch}
        self._steps += 1
        self._company = len(owners) > 1
        self._on_step(len(batch))
        for piece, vector in zip(batch, vectors, strict=True):
            piece.owner.vectors[piece.index] = vector
        for owner in owners:
            if len(owner.vectors) == len(owner.inputs):
                self._finish(owner)

    def _finish(self, waiting: WaitingInputs) -> None:
        with self._changed:
            if self._running.pop(waiting.request_id, None) is not waiting:
                return
        waiting.future.set_result(
            EngineResult(
                vectors=[waiting.vectors[index] for index in range(len(waiting.inputs))],
                usage=_usage(waiting),
            )
        )

    def _end(self, requests: list[WaitingInputs], error: Exception) -> None:
        for waiting in dict.fromkeys(requests):
            with self._changed:
                mine = self._running.pop(waiting.request_id, None) is waiting
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
            if mine:
                waiting.future.set_exception(error)

    # -- its supervision ---------------------------------------------------------------------------
    def _pulse(self) -> Pulse:
        return Pulse(alive=self._thread.is_alive(), running=len(self._running), steps=self._steps)

    def _give_up(self, reason: str) -> None:
        """Called by the watchdog: end all requests as lost, and have the process go.

        A batch that fails is dealt with in the loop; what ends or holds up the thread itself isn't
        understood, and a thread that is stuck inside the model can't be ended.
        """
        if self._dead:
            return
        with self._changed:
            self._dead = True
            running = list(self._running.values())
        log.error("engine_lost", model=self._spec.name, reason=reason, requests=len(running))
        self._end(running, EngineLostError("the engine was lost"))
        self._on_lost()
        self._on_dead()

    # -- the model ---------------------------------------------------------------------------------
    def _load(self) -> Any:
        """The model in the wanted precision, or in float32 where that bends its vectors."""
        wanted = dtype_for(self._spec, self._device)
        model: Any = load_model(self._spec, self._folder, dtype=torch.float32, where=self._device)
        if wanted is torch.float32:
            return model
        samples = [[*self._before, *self._encode(text), *self._after] for text in _SAMPLES]
        exact = torch.tensor(self._embed(model, samples))
        reduced = torch.tensor(self._embed(model.to(wanted), samples))
        cosine = float((exact * reduced).sum(dim=-1).min())
        log.info("embedding_precision", dtype=str(wanted), least_cosine=round(cosine, 6))
        if cosine >= LEAST_COSINE or self._spec.dtype != "auto":
            return model
        return load_model(self._spec, self._folder, dtype=torch.float32, where=self._device)

    @torch.inference_mode()
    def _embed(self, model: Any, batch: list[list[int]]) -> list[list[float]]:
        length = max(map(len, batch))
        ids = torch.zeros((len(batch), length), dtype=torch.int64)
        mask = torch.zeros((len(batch), length), dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Nine decimals are finer than float32 here, and half as long in JSON as a float64.
        vectors = self._pooling(hidden.float(), mask).double().round(decimals=9)
        return vectors.tolist()


def _surroundings(prompts: PromptBuilder) -> tuple[list[int], list[int]]:
    """Tokens the model expects before and after every text, e.g. `[CLS]` and `[SEP]`."""
    bare = prompts.template.encode("a", add_special_tokens=False).ids
    dressed = prompts.template.encode("a", add_special_tokens=True).ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    return [], []


def _usage(waiting: WaitingInputs) -> Usage:
    return Usage(input_tokens=sum(map(len, waiting.inputs)))
