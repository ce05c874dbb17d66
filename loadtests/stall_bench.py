"""16 streamed answers beside a prompt of 6,000 tokens: how long a stream waits for its next token.

The engine's loop alone in one process, on the bundled model with room for its whole context. In
turns: nothing beside the streams, the long prompt with the steps bounded as in a worker (with the
compiled kernel where it can be had, and with torch alone), and with transformers' own scheduling.
A gap is the time between two tokens of one stream while the long prompt waits for its first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from config import catalogue
from config.settings import Models, Settings
from loadtests.harness import Bar, conditions, percentile, report, say, table
from loadtests.lab import run
from loadtests.stack import MODEL
from workers.pinning import pin, unbind
from workers.sources import ensure

STREAMS = 16
PROMPT_TOKENS = 6000
ROUNDS = 3
#: How long gaps are taken where no prompt ends the round.
ALONE_S = 6.0
#: Tokens that every stream has before the prompt comes.
_RUNNING = 8
_MOST_S = 240.0

BARS = (Bar(figure="gap_p99_ms", relation="at most", limit=200.0),)


@dataclass(slots=True)
class Found:
    """What the rounds of one kind gave."""

    gaps_ms: list[float] = field(default_factory=list)
    #: Processor time the process used in each step, divided by the processors: about what the gap
    #: is on a machine that does nothing else.
    alone_ms: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


class Round:
    """Tokens as they come, by the clock of the loop's thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._times: dict[str, list[float]] = {}
        #: Wall clock and processor time of each delivery.
        self._steps: list[tuple[float, float]] = []

    def deliver(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        with self._changed:
            self._steps.append((now, time.process_time()))
            for output in outputs:
                self._times.setdefault(output.request_id, []).append(now)
            self._changed.notify_all()

    def have(self, names: list[str], tokens: int) -> None:
        with self._changed:
            if not self._changed.wait_for(
                lambda: all(len(self._times.get(name, ())) >= tokens for name in names),
                timeout=_MOST_S,
            ):
                raise TimeoutError("the loop stands still")

    def first_s(self, name: str) -> float:
        return self._times[name][0]

    def gaps_ms(self, names: list[str], begin: float, end: float) -> list[float]:
        """Of tokens that came after `begin`, up to the first after `end`."""
        gaps = []
        with self._changed:
            for name in names:
                times = self._times[name]
                gaps += [
                    (later - earlier) * 1000
                    for earlier, later in itertools.pairwise(times)
                    if later > begin and earlier < end
                ]
        return gaps

    def alone_ms(self, begin: float, end: float) -> list[float]:
        cores = os.cpu_count() or 1
        with self._changed:
            return [
                (later[1] - earlier[1]) * 1000 / cores
                for earlier, later in itertools.pairwise(self._steps)
                if later[0] > begin and earlier[0] < end
            ]


class Side:
    """A loop of its own over the model."""

    def __init__(self, model: Any, spec: Any, decoder: Any, *, bounded: bool) -> None:
        from workers.engines.batching import BatchingLoop, batching_config

        config = batching_config(spec, model.device)
        if not bounded:
            config.scheduler_type = "fifo"
        self._round = Round()
        self._loop = BatchingLoop(
            model,
            config,
            deliver=lambda outputs: self._round.deliver(outputs),
            on_step=lambda _: None,
            threads=os.cpu_count() or 1,
            own_attention=True,
            decoder=decoder,
        )
        self._loop.start()
        self._made = 0

    def round(self, *, prompt_tokens: int, into: Found) -> None:
        self._round = Round()
        streams = [self._add(40, most=1900) for _ in range(STREAMS)]
        self._round.have(streams, _RUNNING)
        begin = time.perf_counter()
        if prompt_tokens:
            long = self._add(prompt_tokens, most=1)
            self._round.have([long], 1)
            end = self._round.first_s(long)
            into.first_s.append(end - begin)
        else:
            end = begin + ALONE_S
            self._round.have(streams, _RUNNING + 1)
            while time.perf_counter() < end:
                time.sleep(0.05)
        into.gaps_ms += self._round.gaps_ms(streams, begin, end)
        into.alone_ms += self._round.alone_ms(begin, end)
        for name in streams:
            self._loop.cancel_request(name)

    def _add(self, tokens: int, *, most: int) -> str:
        from workers.admission import Sampling

        self._made += 1
        # New ones each time: nothing of them is in the cache.
        chosen = random.Random(f"{id(self)} {self._made}")
        prompt = [chosen.randrange(100, 40_000) for _ in range(tokens)]
        name = str(self._made)
        self._loop.add(
            name,
            prompt,
            max_tokens=most,
            sampling=Sampling(temperature=0.0),
            every_token=True,
        )
        return name

    def stop(self) -> None:
        self._loop.abandon()
        self._loop.join(0.0, timeout=30)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--sides", default="", help="separated by /")
    chosen = arguments.parse_args()
    where = conditions("torch", "transformers")
    pin(Settings())
    # Imports torch, which must come after `pin`.
    import torch

    from workers.engines import decoder
    from workers.engines.kernels import native
    from workers.loader import device, dtype_for, load_model

    unbind()
    entry = catalogue.load()[MODEL]
    spec = entry.model_copy(update={"context_tokens": 8192, "cache_tokens": 32_768})
    model: Any = load_model(
        spec, ensure(spec, Models()), dtype=dtype_for(spec, device()), where=device()
    )
    # Streams go on until they are cancelled.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    torch.set_num_threads(1)
    kernel = native.choose("auto", Models(), decoder.heads_of(model))
    say(f"kernel: {kernel.isa if kernel else 'none'}")
    decoders = {"torch": decoder.Decoder(model), "compiled": decoder.Decoder(model, kernel)}
    sides = {
        "nothing": ("compiled", True, 0),
        "bounded": ("compiled", True, PROMPT_TOKENS),
        "bounded, torch": ("torch", True, PROMPT_TOKENS),
        "unbounded": ("compiled", False, PROMPT_TOKENS),
    }
    if kernel is None:
        del sides["bounded, torch"]
    if chosen.sides:
        sides = {name: sides[name] for name in chosen.sides.split("/")}
    found = {name: Found() for name in sides}
    for number in range(chosen.rounds):
        for name, (by, bounded, tokens) in sides.items():
            side = Side(model, spec, decoders[by], bounded=bounded)
            side.round(prompt_tokens=tokens, into=found[name])
            side.stop()
            p99 = percentile(found[name].gaps_ms, 99)
            say(f"round {number + 1}/{chosen.rounds} {name}: p99 {p99:.0f} ms so far")
    headings = ["beside the streams", "gap p50 ms", "p99", "max"]
    headings += ["CPU ms / cores p50", "p99", "its first token, s"]
    rows = [
        [
            name,
            *(f"{percentile(into.gaps_ms, each):.0f}" for each in (50, 99, 100)),
            *(f"{percentile(into.alone_ms, each):.0f}" for each in (50, 99)),
            " ".join(f"{each:.1f}" for each in into.first_s),
        ]
        for name, into in found.items()
    ]
    print(
        f"{STREAMS} streams, a prompt of {PROMPT_TOKENS:,} tokens, {MODEL}, {chosen.rounds} rounds"
    )
    print(f"{where}\n")
    print(table(headings, rows), end="\n\n")
    if "bounded" not in found:
        return 0
    return report("stall", {"gap_p99_ms": percentile(found["bounded"].gaps_ms, 99)}, BARS)


if __name__ == "__main__":
    run(main)
