"""Baselines of `loadtests.engine_bench`: the engine alone, nothing around it.

`reference` is transformers' `generate_batch`, `own` the same loop with all that a worker puts
into it.

The same checkpoint, dtype and paged-cache settings as the worker's engine, loaded by the worker's
loader. Reads one JSON line per run, `{"prompts": […], "max_tokens": …}`, and answers with one:
`{"seconds": …, "tokens": …, "prompt_tokens": …}`. Tokenising is not in the time; the manager is
kept between runs, so that setting it up isn't either. Threads wait as the worker's do.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from config import catalogue
from config.settings import Models
from loadtests.stack import MODEL
from workers.pinning import unbind
from workers.sources import ensure


class Offline:
    """transformers alone."""

    def __init__(self) -> None:
        # Imports torch, which must come after `workers.pinning` has looked at the processors.
        from workers.engines.batching import batching_config, generation_config
        from workers.loader import device, dtype_for, load_model, load_tokenizer

        unbind()
        spec = catalogue.load()[MODEL]
        folder = ensure(spec, Models())
        where = device()
        self._model: Any = load_model(spec, folder, dtype=dtype_for(spec, where), where=where)
        self._tokenizer = load_tokenizer(folder)
        self._greedy = generation_config(self._model)
        self._batching = batching_config(spec, where)

    def generate(self, prompts: list[str], max_tokens: int) -> dict[str, float]:
        inputs = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
        began = time.perf_counter()
        tokens = self._run(inputs, max_tokens)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": tokens, "prompt_tokens": sum(map(len, inputs))}

    def _run(self, inputs: list[list[int]], max_tokens: int) -> int:
        outputs = self._model.generate_batch(
            inputs,
            generation_config=self._greedy,
            continuous_batching_config=self._batching,
            persistent_manager=True,
            max_new_tokens=max_tokens,
        )
        if len(outputs) != len(inputs):
            raise RuntimeError(f"generate_batch gave {len(outputs)} of {len(inputs)} answers")
        return sum(len(output.generated_tokens) for output in outputs.values())


class Own(Offline):
    """The worker's loop without the worker."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        from workers.engines.batching import BatchingLoop
        from workers.engines.decoder import Decoder, heads_of
        from workers.engines.kernels import native

        kernel = native.choose("auto", Models(), heads_of(self._model))
        self._decoder = Decoder(self._model, kernel)
        self._decoder.release(self._model)
        torch.set_num_threads(1)
        self._changed = threading.Condition()
        self._lengths: list[int] = []
        self._loop = BatchingLoop(
            self._model,
            self._batching,
            deliver=self._deliver,
            on_step=lambda _: None,
            threads=os.cpu_count() or 1,
            own_attention=True,
            decoder=self._decoder,
        )
        self._loop.start()

    def _deliver(self, outputs: list[Any]) -> None:
        with self._changed:
            self._lengths += [len(output.generated_tokens) for output in outputs]
            self._changed.notify()

    def _run(self, inputs: list[list[int]], max_tokens: int) -> int:
        from workers.admission import Sampling

        self._lengths = []
        greedy = Sampling(temperature=0.0)
        for number, tokens in enumerate(inputs):
            self._loop.add(
                str(number), tokens, max_tokens=max_tokens, sampling=greedy, every_token=False
            )
        with self._changed:
            self._changed.wait_for(lambda: len(self._lengths) == len(inputs))
        return sum(self._lengths)


def main() -> None:
    offline = Own() if sys.argv[1:] == ["own"] else Offline()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(offline.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
