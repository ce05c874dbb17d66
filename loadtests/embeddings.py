"""64 clients that embed one short text per call, through the whole stack; against what they'd use.

`forebay up` on one side: HTTP, keys, queue, Celery worker, micro-batcher, results. On the other
the library offline in batches of 32, in the same precision, which needs no clients at all; and
infinity-emb's server in bfloat16 under the same clients, from an environment of its own
(`.venv-infinity`; named absent where that isn't there). All stay loaded, the others are stopped
(SIGSTOP) while one computes. Texts are new in each round, so that no cache answers.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import uvloop

from config import catalogue
from config.settings import Models, Settings
from loadtests.baseline_embeddings import BATCH
from loadtests.harness import (
    Bar,
    BenchError,
    conditions,
    median_ratio,
    percentile,
    report,
    say,
    table,
)
from loadtests.http_load import Answer, all_at_once, each_once, request
from loadtests.lab import ROOT, Child, Lab, free_port, listening, python, run, until
from loadtests.sides import cpu_times_s, spent_s, stopped
from loadtests.stack import EMBEDDINGS
from workers.pinning import pin
from workers.sources import ensure

CLIENTS = 64
#: Texts of a round; each client sends one after the other.
TEXTS = 1920
WORDS = 20
#: Numbers in a vector of the model.
DIMENSIONS = 384
ROUNDS = 5
ROUND_S = 120.0
INFINITY = ROOT / ".venv-infinity" / "bin" / "infinity_emb"

#: Each of them one token of the model.
_WORDS = """
    river water stone bridge forest mountain valley garden window kitchen table summer winter
    morning evening market station engine paper letter teacher doctor farmer singer painter
    captain village castle harbor island history science music color silver golden simple quiet
""".split()  # noqa: SIM905 - a list would have forty lines

VS_OFFLINE = Bar(figure="embeddings_vs_offline", relation="at least", limit=0.7)
VS_INFINITY = Bar(figure="embeddings_vs_infinity", relation="at least", limit=1.5)


@dataclass(kw_only=True, slots=True)
class Round:
    seconds: float
    #: CPU time of all of the side's processes.
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return TEXTS / self.seconds


def texts_of(number: int) -> list[str]:
    draw = random.Random(number)
    return [" ".join(draw.choices(_WORDS, k=WORDS)) for _ in range(TEXTS)]


class Side(Protocol):
    label: str
    child: Child

    def await_ready(self) -> None: ...

    def run(self, texts: Sequence[str]) -> Round: ...

    def accepts(self) -> bool:
        """Whether it works again after it stood still."""
        ...


class Served:
    """A server under `CLIENTS` connections."""

    label: str
    child: Child
    #: Of the call that embeds, and of one that answers 200 when the server is ready.
    path: str
    health: str
    port: int
    key: str = ""

    def run(self, texts: Sequence[str]) -> Round:
        prepared = [
            request(
                "POST",
                self.path,
                port=self.port,
                body={"model": EMBEDDINGS, "input": text},
                headers={"Authorization": f"Bearer {self.key}"},
            )
            for text in texts
        ]
        answers, seconds = uvloop.run(_timed(self.port, prepared))
        for answer in answers:
            if answer.status != 200:
                raise BenchError(f"a text was answered with {answer.status}: {answer.body[:300]!r}")
        if len(json.loads(answers[-1].body)["data"][0]["embedding"]) != DIMENSIONS:
            raise BenchError("an answer without its vector")
        return Round(seconds=seconds, latencies_s=[answer.latency_s for answer in answers])

    def accepts(self) -> bool:
        ask = request("GET", self.health, port=self.port)
        return uvloop.run(all_at_once(self.port, [ask], timeout_s=10))[0].status == 200


class Stack(Served):
    label = "whole stack, POST /v1/embeddings"
    path = "/v1/embeddings"
    health = "/readyz"

    def __init__(self, lab: Lab) -> None:
        data_dir = str(lab.folder / "stack")
        command = ["up", "--data-dir", data_dir, "--models", EMBEDDINGS, "--no-flower"]
        self.child = lab.start(
            python("api.cli", *command, "--api-port", "0", "--engine", "transformers"),
            name="forebay-up",
            piped=True,
        )

    def await_ready(self) -> None:
        ready = self.child.read_json()
        self.port = int(ready["api"].rpartition(":")[2])
        self.key = ready["admin_key"]


class Infinity(Served):
    label = "infinity-emb, bf16"
    path = "/embeddings"
    health = "/health"

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.port = free_port()
        model = ["--model-id", str(folder), "--served-model-name", EMBEDDINGS]
        self.child = lab.start(
            [
                *(str(INFINITY), "v2", *model, "--engine", "torch", "--device", "cpu"),
                *("--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(self.port)),
            ],
            name="infinity",
            env={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"},
        )

    def await_ready(self) -> None:
        until(
            lambda: listening(self.port) and self.accepts(),
            what="infinity to answer",
            child=self.child,
            timeout_s=180,
        )


class Offline:
    """The library in a process of its own."""

    label = f"transformers alone, batches of {BATCH}"

    def __init__(self, lab: Lab, folder: Path) -> None:
        command = python("loadtests.baseline_embeddings", str(folder))
        self.child = lab.start(command, name="offline", piped=True)
        self.dtype = ""

    def await_ready(self) -> None:
        self.dtype = self.child.read_json()["dtype"]

    def run(self, texts: Sequence[str]) -> Round:
        self.child.stdin.write(json.dumps({"texts": texts}).encode() + b"\n")
        self.child.stdin.flush()
        answer = self.child.read_json()
        if answer["made"] != len(texts):
            raise BenchError(f"the library made {answer['made']} of {len(texts)} vectors")
        return Round(seconds=answer["seconds"])

    def accepts(self) -> bool:
        return True


async def _timed(port: int, prepared: Sequence[bytes]) -> tuple[list[Answer], float]:
    began = time.perf_counter()
    answers = await each_once(port, prepared, connections=CLIENTS, timeout_s=ROUND_S)
    return answers, time.perf_counter() - began


def measure(sides: Sequence[Side]) -> dict[str, list[Round]]:
    """Rounds of all sides, every second one in the opposite order."""
    rounds: dict[str, list[Round]] = {side.label: [] for side in sides}
    for number in range(ROUNDS):
        texts = texts_of(number)
        for side in reversed(sides) if number % 2 else sides:
            with contextlib.ExitStack() as others:
                for other in sides:
                    if other is not side:
                        others.enter_context(stopped(other.child))
                before = cpu_times_s(side.child)
                done = side.run(texts)
                done.cpu_s = spent_s(before, cpu_times_s(side.child))
            for other in sides:
                until(other.accepts, what=f"{other.label} to be ready again", child=other.child)
            rounds[side.label].append(done)
            say(f"round {number + 1}/{ROUNDS} {side.label}: {done.rate:,.0f} texts/s")
    return rounds


def _row(label: str, rounds: list[Round]) -> list[str]:
    rates = [done.rate for done in rounds]
    latencies = [1000 * latency for done in rounds for latency in done.latencies_s]
    shown = (
        f"{percentile(latencies, 50):.0f} / {percentile(latencies, 99):.0f}" if latencies else ""
    )
    return [
        label,
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{statistics.median(done.cpu_s / TEXTS for done in rounds) * 1000:.2f}",
        shown,
    ]


def main() -> int:
    where = conditions("torch", "transformers", "aiohttp", "celery")
    # A worker sets this for itself, the library's side inherits it: their threads wait alike.
    pin(Settings())
    folder = ensure(catalogue.load()[EMBEDDINGS], Models())
    with Lab() as lab:
        stack, offline = Stack(lab), Offline(lab, folder)
        infinity = Infinity(lab, folder) if INFINITY.exists() else None
        sides: list[Side] = [stack, offline, *filter(None, [infinity])]
        for side in sides:
            side.await_ready()
            side.run(texts_of(ROUNDS))
            say(f"{side.label} is warm")
        rounds = measure(sides)
    rates = {label: [done.rate for done in found] for label, found in rounds.items()}
    figures = {VS_OFFLINE.figure: median_ratio(rates[stack.label], rates[offline.label])}
    bars = [VS_OFFLINE]
    if infinity is not None:
        figures[VS_INFINITY.figure] = median_ratio(rates[stack.label], rates[infinity.label])
        bars.append(VS_INFINITY)
    print(
        f"{CLIENTS} clients, {TEXTS:,} texts of {WORDS} words a round, {EMBEDDINGS},"
        f" {offline.dtype.removeprefix('torch.')}, {ROUNDS} rounds"
    )
    print(where, end="\n\n")
    headings = ["side", "texts/s (median)", "rounds", "CPU ms a text", "latency p50 / p99 ms"]
    print(table(headings, [_row(label, done) for label, done in rounds.items()]))
    if infinity is None:
        print("infinity-emb: absent, its environment .venv-infinity could not be made")
    print()
    return report("embeddings", figures, bars)


if __name__ == "__main__":
    run(main)
