"""Chat and completions on vLLM's asynchronous engine, for those who have it installed.

vLLM batches, caches and samples; prompts, admission, stop strings and detokenising are those of the
other engine, so that a model can be moved from one to the other without its users noticing.
It is installed apart from the rest (docs/models.md): its pins of transformers are not ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.catalogue import ModelSpec
from config.logs import get_logger
from workers.admission import Generation, Limits, admit_generation, admit_prompt
from workers.engine import (
    EngineError,
    EngineLostError,
    EngineRequest,
    EngineResult,
    RequestCancelledError,
)
from workers.engines.answers import Answer
from workers.engines.vocabulary import Vocabulary
from workers.prompts import PromptBuilder
from workers.supervision import Pulse, Watchdog

log = get_logger(__name__)

#: Longest wait for a model to be loaded and for the requests that warm it up (s).
_START_S = 1800.0
#: Longest wait for vLLM's processes to end (s).
_STOP_S = 10.0
#: Part of a device's memory it may take when it has the device to itself.
_MEMORY_PART = 0.9


@dataclass
class _Running:
    answer: Answer
    #: All tokens so far.
    tokens: list[int]
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


class VllmEngine:
    """One causal language model on the devices this process may use.

    `eager` starts minutes sooner and computes more slowly: vLLM doesn't compile the model.
    """

    name = "vllm"

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        device_memory_mib: int = 0,
        stall_s: float = 60.0,
        eager: bool = False,
        on_loaded: Callable[[], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_dead: Callable[[], None] | None = None,
    ) -> None:
        self.capacity = spec.max_batch
        self._spec = spec
        self._folder = folder
        self._memory_mib = device_memory_mib
        self._eager = eager
        self._on_loaded = on_loaded or (lambda: None)
        self._on_lost = on_lost or (lambda: None)
        self._on_dead = on_dead or (lambda: None)
        self._watchdog = Watchdog(self._pulse, self._give_up, stall_s=stall_s)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._engine: Any = None
        self._steps = 0
        self._dead = False

    # -- the engine's contract ---------------------------------------------------------------------
    def start(self) -> None:
        from workers.loader import load_tokenizer

        self._prompts = PromptBuilder(load_tokenizer(self._folder))
        self._thread.start()
        self._engine = self._await(self._load())
        config = self._engine.model_config
        limits = Limits.of(self._spec, vocabulary=config.get_vocab_size())
        self._limits = replace(limits, steering=False, choices=1)
        self._ends = _end_tokens(self._folder)
        self._vocabulary = Vocabulary(self._prompts.template, limits.vocabulary, self._ends)
        self._on_loaded()
        body = {"prompt": list(range(3, 35)), "max_tokens": 4}
        for number, temperature in enumerate((0.0, 1.0)):
            warm = EngineRequest(
                id=f"warm-up-{number}",
                endpoint="/v1/completions",
                body={**body, "temperature": temperature},
            )
            self.submit(warm).result(_START_S)
        self._watchdog.start()

    def submit(self, request: EngineRequest) -> Future[EngineResult]:
        prompt, param = self._prompts.prompt(request.endpoint, request.body)
        admit_prompt(prompt, self._limits, param=param)
        generation = admit_generation(request.body, len(prompt), self._limits, param=param)
        on_text = request.on_text
        answer = Answer(
            prompt=prompt,
            generation=generation,
            tokenizer=self._prompts.template,
            vocabulary=self._vocabulary,
            end_tokens=self._ends,
            on_piece=None if on_text is None else lambda text, _: on_text(text),
        )
        running = _Running(answer, [])
        with self._lock:
            if self._dead:
                raise EngineLostError("the engine has stopped")
            self._running[request.id] = running
        self._loop.call_soon_threadsafe(self._begin, request.id, running)
        return answer.future

    def cancel(self, request_id: str) -> None:
        with self._lock:
            running = self._running.pop(request_id, None)
        if running is None:
            return
        running.cancelled = True

        def stop() -> None:
            if running.task is not None:
                # vLLM aborts a request whose reader goes away.
                running.task.cancel()
            running.answer.future.set_exception(
                RequestCancelledError(running.answer.cut(running.tokens, 0))
            )

        self._loop.call_soon_threadsafe(stop)

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def alive(self) -> bool:
        return not self._dead and self._engine is not None and not self._engine.errored

    def stop(self) -> None:
        self._watchdog.stop()
        self._end(EngineLostError("the engine has stopped"))
        if not self._thread.is_alive():
            self._loop.close()
            return
        if self._engine is not None:
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            try:
                closing.result(_STOP_S)
            except TimeoutError:
                log.warning("vllm_not_stopped", model=self._spec.name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():
            self._loop.close()

    # -- in the loop's thread ----------------------------------------------------------------------
    async def _load(self) -> Any:
        # It would tell its makers of each start otherwise.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        # CUDA may not be forked, and the worker has threads.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(self._folder),
            dtype=self._spec.dtype,
            max_model_len=self._spec.context_tokens,
            max_num_seqs=self._spec.max_batch,
            tensor_parallel_size=max(1, self._spec.devices),
            gpu_memory_utilization=self._memory_part(),
            load_format="safetensors",
            trust_remote_code=False,
            enforce_eager=self._eager,
            # Whether a prefix is cached shows in the time an answer takes, across tenants too.
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        return AsyncLLM.from_engine_args(arguments)

    def _memory_part(self) -> float:
        import torch

        if not self._memory_mib or not torch.cuda.is_available():
            return _MEMORY_PART
        total = torch.cuda.get_device_properties(0).total_memory
        return float(min(_MEMORY_PART, self._memory_mib * 1024**2 / total))

    async def _close(self) -> None:
        self._engine.shutdown()

    def _begin(self, request_id: str, running: _Running) -> None:
        if not running.cancelled:
            running.task = self._loop.create_task(self._follow(request_id, running))

    async def _follow(self, request_id: str, running: _Running) -> None:
        """Take a request's tokens as they come, and end its answer."""
        answer = running.answer
        try:
            outputs = self._engine.generate(
                {"prompt_token_ids": answer.prompt}, _sampling_params(answer), request_id
            )
            async for output in outputs:
                self._steps += 1
                running.tokens = list(output.outputs[0].token_ids)
                if answer.every_token and not output.finished:
                    answer.take(running.tokens)
                    if answer.stopped:
                        await outputs.aclose()
                        await self._engine.abort(request_id)
                        break
            result = answer.finish(running.tokens, 0)
        except asyncio.CancelledError:
            return
        except Exception as error:
            self._fail(request_id, running, error)
            return
        if self._take(request_id):
            answer.future.set_result(result)

    def _fail(self, request_id: str, running: _Running, error: Exception) -> None:
        # Its message could hold text of the answer.
        log.error("answer_failed", error=type(error).__name__)
        if not self._take(request_id):
            return
        if self._engine.errored:
            running.answer.future.set_exception(EngineLostError("the engine was lost"))
        else:
            running.answer.future.set_exception(EngineError("internal_error", "the request failed"))

    # -- the engine's life -------------------------------------------------------------------------
    def _await(self, doing: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(_START_S)

    def _take(self, request_id: str) -> bool:
        """Whether the request is still to be ended, which is from now on the caller's part."""
        with self._lock:
            return self._running.pop(request_id, None) is not None

    def _pulse(self) -> Pulse:
        return Pulse(alive=self.alive, running=len(self._running), steps=self._steps)

    def _give_up(self, reason: str) -> None:
        """vLLM isn't rebuilt in place: the process leaves and is started afresh."""
        if self._dead:
            return
        log.error("engine_lost", model=self._spec.name, reason=reason, requests=len(self._running))
        self._on_lost()
        self._end(EngineLostError("the engine was lost"))
        self._on_dead()

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._dead = True
            left = list(self._running.values())
            self._running.clear()
        for running in left:
            running.answer.future.set_exception(error)


def _sampling_params(answer: Answer) -> Any:
    from vllm import SamplingParams

    generation: Generation = answer.generation
    sampling = generation.sampling
    return SamplingParams(
        max_tokens=generation.max_tokens,
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=1.0 if sampling.greedy else sampling.top_p,
        top_k=0 if sampling.greedy else sampling.top_k,
        min_p=sampling.min_p,
        # To vLLM -1 is no seed.
        seed=None if sampling.seed is None else sampling.seed % 2**63,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        # Text and stop strings are made of the tokens here, as for every engine.
        detokenize=False,
    )


def _end_tokens(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
