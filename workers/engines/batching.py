"""transformers' continuous batching loop with our hooks; all use of its inner names is here.

Written for transformers 5.23-5.24 (see setup.cfg). What is changed, and why:
- results go straight to a callback, not through an asyncio loop or a queue searched by id;
- the loop's thread gets its own number of torch threads, and every step is counted and shown;
- tokens are drawn by `workers.engines.sampling`;
- attention on the CPU is that of `workers.engines.attention`, and the forward pass that of
  `workers.engines.decoder`, where they can be;
- long prompts are taken in parts while answers are generated (`workers.engines.scheduling`);
- a request whose scores are no numbers, or whose grammar leads nowhere, fails alone;
- prefix matches are noted, so that usage can tell cached tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    OutputRouter,
)

from config.catalogue import ModelSpec
from config.logs import get_logger
from workers.admission import Sampling
from workers.engines import attention, scheduling
from workers.engines.decoder import Decoder
from workers.engines.progress import Progress
from workers.engines.sampling import SamplingProcessors

#: Tokens in a page of the KV cache. On the CPU 32 was faster than transformers' 256.
PAGE_TOKENS = 32
#: Tokens of one step on the CPU, prompts included; more makes running answers wait longer.
CPU_BATCH_TOKENS = 512
#: Longest a step with answers in it should take, where nothing else is said.
STEP_MS = 120.0

scheduling.register()

Deliver = Callable[[list[Any]], None]

log = get_logger(__name__)

# Its own handler would tear the log lines apart, and some of its warnings show prompt tokens.
_library_log = logging.getLogger("ContinuousBatchingLogger")
_library_log.handlers.clear()
_library_log.propagate = True
_library_log.setLevel(logging.ERROR)


def batching_config(
    spec: ModelSpec, device: torch.device, *, part: float = 1.0
) -> ContinuousBatchingConfig:
    """How a model of the catalogue is batched; `part` scales its memory after running out of it."""
    cpu = device.type == "cpu"
    cache_tokens = spec.cache_tokens
    if not cache_tokens and cpu:
        cache_tokens = min(spec.max_batch * 1024, 65_536)
    requests = max(1, int(spec.max_batch * part))
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=max(1, int(cache_tokens * part) // PAGE_TOKENS) if cache_tokens else None,
        max_batch_tokens=max(CPU_BATCH_TOKENS, requests) if cpu else None,
        max_requests_per_batch=requests,
        max_memory_percent=None if cpu else 0.8 * part,
        auto_switch_to_flash=not cpu,
        # On a device a step of all its tokens is short enough.
        scheduler_type=scheduling.NAME if cpu else "fifo",
    )


def generation_config(model: Any) -> GenerationConfig:
    """Greedy: sampling is done by `SamplingProcessors`. Every request brings its own length."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    return GenerationConfig(do_sample=False, eos_token_id=-1 if ends is None else ends)


class _Router(OutputRouter):  # type: ignore[misc]
    def __init__(self, deliver: Deliver) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: Any) -> None:
        self._deliver([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._deliver(outputs)


class BatchingLoop(ContinuousBatchingManager):  # type: ignore[misc]
    """One run of the loop. `deliver` and `on_step` are called in its thread and must be quick."""

    def __init__(
        self,
        model: Any,
        config: ContinuousBatchingConfig,
        *,
        deliver: Deliver,
        on_step: Callable[[int], None],
        threads: int,
        own_attention: bool = False,
        decoder: Decoder | None = None,
        step_ms: float = STEP_MS,
    ) -> None:
        # Chosen first: transformers lays its tensors out by it.
        if own_attention:
            attention.switch(model)
        self._own_attention = own_attention
        #: What computes a step in the model's place; needs the own attention.
        self._decoder = decoder
        super().__init__(
            model=model,
            generation_config=generation_config(model),
            continuous_batching_config=config,
        )
        self.logit_processor = SamplingProcessors()
        self.output_router = _Router(deliver)
        self._on_step = on_step
        self._threads = threads
        #: Longest a step with answers in it should take.
        self._step_s = step_ms / 1000
        #: Prompt tokens found in the cache, by request.
        self.cached: dict[str, int] = {}
        #: Steps done.
        self.steps = 0
        #: Tokens the KV cache holds; 0 until it is made.
        self.capacity_tokens = 0
        #: The cache is made, or can't be.
        self._cache_settled = threading.Event()

    # -- for the engine ----------------------------------------------------------------------------
    def add(
        self,
        request_id: str,
        tokens: list[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        progress: Progress | None = None,
        every_token: bool,
    ) -> bool:
        """Queue a request; False when the loop takes none any more."""
        accepted = self.add_request(
            tokens,
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=every_token,
            sampling=sampling,
            progress=progress or Progress(),
        )
        return accepted is not None

    def generated(self, request_id: str) -> list[int]:
        """Tokens of a running request so far; empty when it is unknown."""
        processor = self.batch_processor
        if processor is None:
            return []
        state = processor.scheduler.active_requests.get(request_id)
        return [] if state is None else state.to_generation_output().generated_tokens

    def await_cache(self, timeout_s: float) -> int:
        """Tokens the KV cache holds, once it is made; 0 when it isn't in time or can't be."""
        self._cache_settled.wait(timeout_s)
        return self.capacity_tokens

    @property
    def accepts(self) -> bool:
        return self.is_running() and self.background_thread_status.can_accept_new_requests() is None

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop, if it was an error."""
        error: BaseException | None = self.background_thread_status.fatal_error
        return error

    def abandon(self) -> None:
        """Tell the loop to end at its next step, without waiting for it."""
        self.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        self._wake_up_loop.set()

    # -- inside the loop's thread ------------------------------------------------------------------
    def _create_batch_processor(self) -> Any:
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            processor = self._batch_processor()
            self.capacity_tokens = processor.cache.num_blocks * PAGE_TOKENS
        finally:
            self._cache_settled.set()
        if isinstance(processor.scheduler, scheduling.BoundedScheduler):
            processor.scheduler.pace.target_s = self._step_s
        search = processor.cache.search_prefix_match

        def noting(request_id: str, tokens: list[int]) -> int:
            found: int = search(request_id, tokens)
            if found:
                self.cached.setdefault(request_id, found)
            return found

        processor.cache.search_prefix_match = noting
        return processor

    def _batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if self._own_attention and (lacking := attention.install(processor)):
            if self._decoder is not None and self._decoder.alone:
                raise RuntimeError("the model has given its weights away")
            log.warning("own_attention_unavailable", lacking=lacking)
            attention.switch_back(self.model)
            self._decoder = None
            processor = super()._create_batch_processor()
        return processor

    @property
    def own_forward(self) -> bool:
        """Whether steps are computed by the decoder; once the cache is made."""
        return self._decoder is not None

    def _generation_step(self) -> None:
        self.batch_processor._generation_step(self._decoder or self.model)
        self._fail_spoilt()
        self.steps += 1
        self._on_step(len(self.batch_processor.inputs_and_outputs.requests_in_batch))

    def _fail_spoilt(self) -> None:
        """End the requests whose scores can't be used; those beside them go on."""
        for state in getattr(self.logit_processor, "spoilt", ()):
            self.output_router.fail_and_deliver(state, ArithmeticError("scores are not numbers"))
            self.cancel_request(state.request_id)
