"""A micro-batcher over an encoder: embeddings, classification and reranking.

Inputs of all waiting requests are cut into batches of similar length, so that little is padded.
While a batch is computed the next one gathers by itself; only under load is a moment waited for
more company. On the CPU several batches are computed side by side, with few threads each: they
never wait for each other's threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from broker.jobs import Usage
from config.catalogue import ModelSpec
from config.logs import get_logger
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.engines.bucketing import Piece, WaitingInputs, next_batch
from workers.engines.heads import head_for
from workers.loader import device
from workers.supervision import Pulse, Watchdog

log = get_logger(__name__)

#: Tokens of one batch, padding included. The CPU is no faster with more.
DEVICE_BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 768
#: Most batches computed at a time on the CPU.
MAX_LANES = 4
#: Longest wait for company while several requests are about.
MAX_WAIT_S = 0.002
#: Longest wait for the batch under way at the end.
_STOP_S = 5.0


class EncoderEngine:
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
        self._head = head_for(spec, folder)
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
        self._lanes: list[threading.Thread] = []
        self._batch_tokens = 0
        self._company = False
        self._steps = 0
        #: Batches begun so far, and the numbers of those under way.
        self._begun = 0
        self._under_way: set[int] = set()
        self._stopping = False
        self._dead = False

    # -- the engine's contract ---------------------------------------------------------------------
    def start(self) -> None:
        where = device()
        self._head.start(where)
        self._on_loaded()
        on_cpu = where.type == "cpu"
        self._batch_tokens = CPU_BATCH_TOKENS if on_cpu else DEVICE_BATCH_TOKENS
        lanes = min(self._threads, MAX_LANES) if on_cpu else 1
        # Only the engine's threads compute in parallel.
        torch.set_num_threads(1)
        self._lanes = [
            threading.Thread(
                target=self._loop,
                args=(self._threads // lanes,),
                name=f"encoder-{number}",
                daemon=True,
            )
            for number in range(lanes)
        ]
        for lane in self._lanes:
            lane.start()
        warm_ups = [
            self.submit(EngineRequest(id=f"warm-up-{number}", endpoint="", body=self._head.warm_up))
            for number in range(2 * lanes)
        ]
        for future in warm_ups:
            future.result()
        self._watchdog.start()

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        body = request.body
        waiting = WaitingInputs(request.id, self._head.inputs(body), body)
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
        return not self._dead and self._computes

    def stop(self) -> None:
        self._watchdog.stop()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + _STOP_S
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        self._end(list(self._running.values()), EngineLostError("the engine has stopped"))

    # -- a lane's loop -----------------------------------------------------------------------------
    def _loop(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting)
                if self._stopping:
                    return
                if self._company:
                    self._await_company()
                batch = next_batch(self._waiting, self._batch_tokens)
                if not batch:
                    continue
                number = self._begun
                self._begun += 1
                self._under_way.add(number)
                if self._waiting:
                    self._changed.notify()
            self._run(batch)
            with self._changed:
                self._under_way.remove(number)

    def _await_company(self) -> None:
        deadline = time.monotonic() + MAX_WAIT_S
        while (left := deadline - time.monotonic()) > 0 and not self._stopping:
            if sum(waiting.open_tokens for waiting in self._waiting) >= self._batch_tokens:
                return
            self._changed.wait(left)

    def _run(self, batch: list[Piece]) -> None:
        try:
            rows = self._head.compute(batch)
        except (torch.OutOfMemoryError, MemoryError):
            self._batch_tokens = max(self._head.context_tokens, self._batch_tokens // 2)
            log.warning("encoder_batch_shrunk", tokens=self._batch_tokens, inputs=len(batch))
            if len(batch) > 1:
                middle = len(batch) // 2
                self._run(batch[:middle])
                self._run(batch[middle:])
            else:
                self._end([batch[0].owner], EngineError("out_of_memory", "the input is too large"))
            return
        except Exception as error:
            # Its message could hold text of the inputs.
            log.error("encoder_batch_failed", inputs=len(batch), error=type(error).__name__)
            self._end([piece.owner for piece in batch], error)
            return
        owners = {piece.owner for piece in batch}
        with self._changed:
            self._steps += 1
            self._company = len(owners) > 1
            for piece, row in zip(batch, rows, strict=True):
                piece.owner.outputs[piece.index] = row
            done = [owner for owner in owners if self._complete(owner)]
        self._on_step(len(batch))
        for owner in done:
            self._finish(owner)

    def _complete(self, waiting: WaitingInputs) -> bool:
        """Whether all is computed; a request that is said to be complete no longer runs."""
        if len(waiting.outputs) < len(waiting.inputs.tokens):
            return False
        if self._running.get(waiting.request_id) is not waiting:
            return False
        del self._running[waiting.request_id]
        return True

    def _finish(self, waiting: WaitingInputs) -> None:
        rows = [waiting.outputs[index] for index in range(len(waiting.outputs))]
        try:
            waiting.future.set_result(self._head.result(waiting.body, rows, _usage(waiting)))
        except EngineError as error:
            waiting.future.set_exception(error)

    def _end(self, requests: list[WaitingInputs], error: Exception) -> None:
        for waiting in dict.fromkeys(requests):
            with self._changed:
                mine = self._running.get(waiting.request_id) is waiting
                if mine:
                    del self._running[waiting.request_id]
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
            if mine:
                waiting.future.set_exception(error)

    # -- its supervision ---------------------------------------------------------------------------
    @property
    def _computes(self) -> bool:
        return bool(self._lanes) and all(lane.is_alive() for lane in self._lanes)

    def _pulse(self) -> Pulse:
        """Its step is the oldest batch under way: one that hangs shows beside others that don't."""
        with self._changed:
            oldest = min(self._under_way, default=self._begun)
            return Pulse(alive=self._computes, running=len(self._running), steps=oldest)

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


def _usage(waiting: WaitingInputs) -> Usage:
    return Usage(input_tokens=waiting.tokens)
