"""What holding answers to a form costs a step: `make bench-masks`.

The engine alone with a full batch of chats, in turns without a form, with a JSON schema for half of
them and for all, greedy. A step is timed from the one before it; what the masks take of it is the
processor time of the loop's thread, which other load on the machine doesn't change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import quantiles
from typing import Any

import torch

from config import catalogue
from config.settings import Models
from workers.engine import EngineRequest
from workers.engines.continuous import ContinuousEngine
from workers.engines.vocabulary import Guide
from workers.sources import ensure

_SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["river", "lake", "sea"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}
_FORM = {"type": "json_schema", "json_schema": {"name": "rows", "schema": _SCHEMA}}


class _Steps:
    """Milliseconds of the steps in which the whole batch generates."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._last: float | None = None
        self.taken_ms: list[float] = []
        #: Of it, in masks.
        self.masks_ms: list[float] = []

    def __call__(self, size: int, masks_s: float) -> None:
        now = time.perf_counter()
        if size == self._batch and self._last is not None:
            self.taken_ms.append((now - self._last) * 1000)
            self.masks_ms.append(masks_s * 1000)
        self._last = now if size == self._batch else None


class _Clock:
    """Passes steps on to the timer of the round at hand, with the time their masks took."""

    def __init__(self) -> None:
        self.timer = _Steps(0)
        self._masks_s = 0.0

    def __call__(self, size: int) -> None:
        self.timer(size, self._masks_s)
        self._masks_s = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        hold = Guide.hold

        def timed(guide: Guide, scores: torch.Tensor, answer: Sequence[int]) -> None:
            started = time.thread_time()
            hold(guide, scores, answer)
            self._masks_s += time.thread_time() - started

        setattr(Guide, "hold", timed)  # noqa: B010
        try:
            yield
        finally:
            setattr(Guide, "hold", hold)  # noqa: B010


def _round(engine: ContinuousEngine, batch: int, held: int, tokens: int, turn: int) -> None:
    """One full batch, `held` of whose answers keep to the schema."""
    futures = []
    for number in range(batch):
        question = f"Number {turn}.{number}: tell me all about rivers, one after another."
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        if number < held:
            body["response_format"] = _FORM
        name = f"job_{turn}_{number}"
        request = EngineRequest(id=name, endpoint="/v1/chat/completions", body=body)
        futures.append(engine.submit(request))
    for future in futures:
        future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    found = catalogue.load()["smollm2-135m"]
    folder = ensure(found, Models())
    print("| chats | held to a schema | steps | step ms, p10 | p50 | masks ms, p50 | p90 |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batches:
        spec = found.model_copy(update={"max_batch": batch})
        steps = {held: _Steps(batch) for held in (0, batch // 2, batch)}
        clock = _Clock()
        engine = ContinuousEngine(spec, folder, on_step=clock)
        engine.start()
        with clock.watching():
            for turn in range(args.rounds):
                for held, clock.timer in steps.items():
                    _round(engine, batch, held, args.tokens, turn)
        engine.stop()
        for held, timer in steps.items():
            step, masks = (quantiles(each, n=10) for each in (timer.taken_ms, timer.masks_ms))
            shown = " | ".join(f"{each:.1f}" for each in (step[0], step[4], masks[4], masks[8]))
            print(f"| {batch} | {held} | {len(timer.taken_ms)} | {shown} |")


if __name__ == "__main__":
    main()
