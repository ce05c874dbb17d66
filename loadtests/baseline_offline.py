"""Baseline of `loadtests.engine_bench`: transformers' `generate_batch`, nothing around it.

The same checkpoint, dtype and paged-cache settings as the worker's engine, loaded by the worker's
loader. Reads one JSON line per run, `{"prompts": […], "max_tokens": …}`, and answers with one:
`{"seconds": …, "tokens": …, "prompt_tokens": …}`. Tokenising is not in the time; the manager is
kept between runs, so that setting it up isn't either. Threads wait as the worker's do.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from config import catalogue
from config.settings import Models
from loadtests.stack import MODEL
from workers.engines.batching import batching_config, generation_config
from workers.loader import device, dtype_for, load_model, load_tokenizer
from workers.sources import ensure


class Offline:
    def __init__(self) -> None:
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
        outputs = self._model.generate_batch(
            inputs,
            generation_config=self._greedy,
            continuous_batching_config=self._batching,
            persistent_manager=True,
            max_new_tokens=max_tokens,
        )
        seconds = time.perf_counter() - began
        if len(outputs) != len(inputs):
            raise RuntimeError(f"generate_batch gave {len(outputs)} of {len(inputs)} answers")
        return {
            "seconds": seconds,
            "tokens": sum(len(output.generated_tokens) for output in outputs.values()),
            "prompt_tokens": sum(map(len, inputs)),
        }


def main() -> None:
    offline = Offline()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(offline.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
