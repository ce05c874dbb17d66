"""Chats through Forebay's whole stack, side by side with the servers its users would pick instead.

`forebay up`, the engine alone in a process of its own, `transformers serve --continuous-batching`
and vLLM's CPU build serve the same checkpoint in bfloat16. All stay loaded; the others are stopped
(SIGSTOP) while one computes. Each round has prompts nobody has seen, asks every side for the same
number of tokens, and counts those that came. vLLM lives in an environment of its own and is named
absent where that isn't there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import uvloop

from config import catalogue
from config.settings import Models, Settings
from loadtests.harness import Bar, BenchError, conditions, median_ratio, report, say, table
from loadtests.http_load import Answer, all_at_once, request
from loadtests.lab import ROOT, Child, Lab, free_port, listening, python, run, until
from loadtests.sides import cpu_times_s, spent_s, stopped
from loadtests.stack import MODEL
from workers.pinning import pin
from workers.sources import ensure

MAX_TOKENS = 48
ROUNDS = 3
WARMUP_TOKENS = 8
ROUND_S = 300.0
#: No round is begun after this.
BUDGET_S = 900.0
#: vLLM compiles its model at its first start.
START_S = 480.0
VLLM = ROOT / ".venv-vllm" / "bin"
TRANSFORMERS = ROOT / ".venv" / "bin" / "transformers"
#: As large as the worker's (`cache_tokens` in the catalogue), in GiB: 23 KiB a token.
VLLM_CACHE_GIB = "2"

FOREBAY, ALONE, SERVE, VLLM_SERVE = (
    "Forebay, whole stack",
    "Forebay's engine alone",
    "transformers serve",
    "vLLM",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One kind of round."""

    label: str
    chats: int
    #: Sampling, as the API's fields.
    fields: Mapping[str, float]


GREEDY = {"temperature": 0}
LOADS = (
    Load(label="16 greedy", chats=16, fields=GREEDY),
    Load(label="64 greedy", chats=64, fields=GREEDY),
    Load(
        label="64, temperature 0.7, top-p 0.9", chats=64, fields={"temperature": 0.7, "top_p": 0.9}
    ),
)

BARS = (
    Bar(figure="stack_vs_engine_16", relation="at least", limit=0.95),
    Bar(figure="stack_vs_engine_64", relation="at least", limit=0.95),
    Bar(figure="vs_transformers_serve_64", relation="at least", limit=1.5),
)
VLLM_BARS = (
    Bar(figure="vs_vllm_16", relation="at least", limit=0.75),
    Bar(figure="vs_vllm_64", relation="at least", limit=0.75),
)


class Side(Protocol):
    label: str
    child: Child

    def await_ready(self) -> None: ...

    def tokens(self, texts: list[str], max_tokens: int, fields: Mapping[str, float]) -> int:
        """Generate, and tell how many tokens came."""
        ...


class Server:
    """Something that answers `POST /v1/chat/completions`."""

    def __init__(self, label: str, child: Child, port: int, *, model: str, key: str = "") -> None:
        self.label = label
        self.child = child
        self._port = port
        self._model = model
        self._key = key

    def await_ready(self) -> None:
        until(lambda: listening(self._port), what=self.label, child=self.child, timeout_s=START_S)

    def tokens(self, texts: list[str], max_tokens: int, fields: Mapping[str, float]) -> int:
        prepared = [
            request(
                "POST",
                "/v1/chat/completions",
                port=self._port,
                body={
                    "model": self._model,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": max_tokens,
                    **fields,
                },
                headers={"Authorization": f"Bearer {self._key}"},
            )
            for text in texts
        ]
        answers = uvloop.run(all_at_once(self._port, prepared, timeout_s=ROUND_S))
        return sum(map(self._counted, answers))

    def _counted(self, answer: Answer) -> int:
        if answer.status != 200:
            text = answer.body[:300]
            raise BenchError(f"{self.label} answered a chat with {answer.status}: {text!r}")
        return int(json.loads(answer.body)["usage"]["completion_tokens"])


class Forebay(Server):
    """`forebay up`, whose address is known once it is ready."""

    def __init__(self, lab: Lab) -> None:
        data_dir = str(lab.folder / "stack")
        ports = ["--api-port", "0", "--flower-port", "0"]
        command = python("api.cli", "up", "--data-dir", data_dir, *ports)
        child = lab.start(command, name="forebay-up", piped=True)
        super().__init__(FOREBAY, child, 0, model=MODEL)

    def await_ready(self) -> None:
        ready = self.child.read_json()
        self._port, self._key = int(ready["api"].rpartition(":")[2]), ready["admin_key"]

    def tokens(self, texts: list[str], max_tokens: int, fields: Mapping[str, float]) -> int:
        count = super().tokens(texts, max_tokens, fields)
        until(self._accepts, what="the stack to be ready again", child=self.child)
        return count

    def _accepts(self) -> bool:
        ask = request("GET", "/readyz", port=self._port)
        return uvloop.run(all_at_once(self._port, [ask], timeout_s=10))[0].status == 200


class Alone:
    """The worker's engine without the stack; greedy only."""

    label = ALONE

    def __init__(self, lab: Lab) -> None:
        command = python("loadtests.baseline_offline", "own")
        self.child = lab.start(command, name="engine-alone", piped=True)

    def await_ready(self) -> None:
        self.child.read_json()

    def tokens(self, texts: list[str], max_tokens: int, fields: Mapping[str, float]) -> int:
        line = json.dumps({"prompts": texts, "max_tokens": max_tokens})
        self.child.stdin.write(line.encode() + b"\n")
        self.child.stdin.flush()
        return int(self.child.read_json()["tokens"])


def transformers_serve(lab: Lab, folder: Path) -> Server:
    port = free_port()
    child = lab.start(
        [
            str(TRANSFORMERS), "serve", str(folder), "--continuous-batching", "--dtype", "bfloat16",
            "--port", str(port), "--host", "127.0.0.1", "--cb-block-size", "32",
        ],
        name="transformers-serve",
    )  # fmt: skip
    return Server(SERVE, child, port, model=str(folder))


def vllm_serve(lab: Lab, folder: Path) -> Server:
    port = free_port()
    child = lab.start(
        [
            str(VLLM / "python"), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(folder), "--served-model-name", MODEL,
            "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64",
            "--host", "127.0.0.1", "--port", str(port), "--no-enable-log-requests",
        ],
        name="vllm",
        env={
            "PATH": f"{VLLM}:/usr/local/bin:/usr/bin:/bin",
            "VLLM_CPU_KVCACHE_SPACE": VLLM_CACHE_GIB,
            # By itself it leaves a core to the serving process, of which there are few here.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )  # fmt: skip
    return Server(VLLM_SERVE, child, port, model=MODEL)


@dataclass(kw_only=True, slots=True)
class Seen:
    """What was seen of one side under one load: tokens a second, CPU seconds a token."""

    rates: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def prompts(load: Load, number: int) -> list[str]:
    """Different from the first word on, so that no cached prefix helps."""
    begin = (number * len(LOADS) + LOADS.index(load)) * 1000
    return [
        f"{begin + chat}: tell a long story about a harbour with {chat + 2} ships."
        for chat in range(load.chats)
    ]


def measure(sides: list[Side]) -> dict[tuple[str, str], Seen]:
    """Rounds of all loads on all sides, every second one in the opposite order."""
    seen: dict[tuple[str, str], Seen] = {
        (load.label, side.label): Seen() for load in LOADS for side in sides
    }
    began = time.monotonic()
    for number in range(ROUNDS):
        if time.monotonic() - began > BUDGET_S:
            say(f"{BUDGET_S:g} s are over; {number} rounds must do")
            break
        for load in LOADS:
            for side in reversed(sides) if number % 2 else sides:
                if isinstance(side, Alone) and load.fields != GREEDY:
                    continue
                with stopped(*(other.child for other in sides if other is not side)):
                    rate, cpu_s = _one(side, prompts(load, number), load)
                seen[load.label, side.label].rates.append(rate)
                seen[load.label, side.label].cpu_s.append(cpu_s)
                say(f"round {number + 1}/{ROUNDS} {load.label}, {side.label}: {rate:,.0f} tokens/s")
    return seen


def _one(side: Side, texts: list[str], load: Load) -> tuple[float, float]:
    before, began = cpu_times_s(side.child), time.perf_counter()
    tokens = side.tokens(texts, MAX_TOKENS, load.fields)
    seconds = time.perf_counter() - began
    return tokens / seconds, spent_s(before, cpu_times_s(side.child)) / tokens


def _figures(seen: dict[tuple[str, str], Seen], labels: list[str]) -> dict[str, float]:
    def ratio(load: int, other: str) -> float:
        ours = seen[LOADS[load].label, FOREBAY].rates
        return median_ratio(ours, seen[LOADS[load].label, other].rates)

    figures = {
        "stack_vs_engine_16": ratio(0, ALONE),
        "stack_vs_engine_64": ratio(1, ALONE),
        "vs_transformers_serve_16": ratio(0, SERVE),
        "vs_transformers_serve_64": ratio(1, SERVE),
        "vs_transformers_serve_64_sampled": ratio(2, SERVE),
    }
    if VLLM_SERVE in labels:
        figures |= {
            "vs_vllm_16": ratio(0, VLLM_SERVE),
            "vs_vllm_64": ratio(1, VLLM_SERVE),
            "vs_vllm_64_sampled": ratio(2, VLLM_SERVE),
        }
    return figures


def _row(side: str, load: Load, seen: Seen) -> list[str]:
    return [
        load.label,
        side,
        f"{statistics.median(seen.rates):,.0f}",
        f"{min(seen.rates):,.0f}-{max(seen.rates):,.0f}",
        f"{statistics.median(seen.cpu_s) * 1000:.1f}",
    ]


def _warm(side: Side) -> None:
    """Once as wide as it gets: compiled, allocated and loaded is everything then."""
    load = LOADS[1]
    side.tokens(prompts(load, ROUNDS), WARMUP_TOKENS, GREEDY)


def main() -> int:
    where = conditions("torch", "transformers", "aiohttp", "celery")
    pin(Settings())
    folder = ensure(catalogue.load()[MODEL], Models())
    makers: list[Callable[[Lab], Side]] = [
        Forebay,
        Alone,
        lambda lab: transformers_serve(lab, folder),
    ]
    if VLLM.exists():
        makers.append(lambda lab: vllm_serve(lab, folder))
    else:
        say("vLLM isn't installed in .venv-vllm: absent")
    with Lab() as lab:
        sides: list[Side] = []
        for make in makers:
            # One after the other: what compiles or measures the machine finds it free.
            with stopped(*(each.child for each in sides)):
                side = make(lab)
                side.await_ready()
                _warm(side)
            sides.append(side)
            say(f"{side.label} is warm")
        seen = measure(sides)
    labels = [side.label for side in sides]
    figures = _figures(seen, labels)
    print(f"Concurrent chats of {MAX_TOKENS} tokens, {MODEL}, bfloat16, up to {ROUNDS} rounds")
    print(f"{where}\n")
    if VLLM_SERVE not in labels:
        print("vLLM: absent\n")
    rows = [
        _row(side, load, seen[load.label, side])
        for load in LOADS
        for side in labels
        if seen[load.label, side].rates
    ]
    print(
        table(["load", "side", "tokens/s (median)", "rounds", "CPU ms a token"], rows), end="\n\n"
    )
    return report("peers", figures, BARS + VLLM_BARS if VLLM_SERVE in labels else BARS)


if __name__ == "__main__":
    run(main)
