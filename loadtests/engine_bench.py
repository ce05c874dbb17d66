"""64 concurrent chats through the whole stack against the engine alone, and `generate_batch`.

`forebay up` on one side: HTTP, keys, queue, Celery worker, engine, results. On the other a process
that runs the same loop with nothing around it (equal terms), and one that calls transformers alone
with the same model. All stay loaded, the others are stopped (SIGSTOP) while one computes. Prompts
are new in each round, greedy, and ask for long answers; tokens are counted as they come.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field

import uvloop

from config.settings import Settings
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
from loadtests.http_load import Answer, all_at_once, request
from loadtests.lab import Child, Lab, python, run, until
from loadtests.sides import cpu_times_s, spent_s, stopped
from loadtests.stack import MODEL, request_body
from workers.pinning import pin

CHATS = 64
MAX_TOKENS = 48
ROUNDS = 4
WARMUP_TOKENS = 8
ROUND_S = 240.0
#: No round is begun after this; a busy machine gets fewer of them.
BUDGET_S = 330.0
#: Window in which the idle stack's use of the processors is read.
IDLE_S = 3.0

BARS = (Bar(figure="stack_vs_engine_64", relation="at least", limit=0.90),)


@dataclass(kw_only=True, slots=True)
class Round:
    tokens: int
    seconds: float
    #: CPU time of all of the side's processes.
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def prompts(number: int) -> list[str]:
    """Different from the first word on, so that no cached prefix of an earlier round helps."""
    return [
        f"{number * CHATS + chat}: tell a long story about a harbour with {chat + 2} ships."
        for chat in range(CHATS)
    ]


class Stack:
    label = "whole stack, POST /v1/chat/completions"

    def __init__(self, lab: Lab) -> None:
        data_dir = str(lab.folder / "stack")
        ports = ["--api-port", "0", "--flower-port", "0"]
        self.child = lab.start(
            python("api.cli", "up", "--data-dir", data_dir, *ports, "--engine", "transformers"),
            name="forebay-up",
            piped=True,
        )
        self._ready: dict[str, str] = {}

    def await_ready(self) -> None:
        self._ready = self.child.read_json()

    @property
    def _port(self) -> int:
        return int(self._ready["api"].rpartition(":")[2])

    def run(self, texts: list[str], max_tokens: int) -> Round:
        prepared = [
            request(
                "POST",
                "/v1/chat/completions",
                port=self._port,
                body=request_body(text, max_tokens=max_tokens),
                headers={"Authorization": f"Bearer {self._ready['admin_key']}"},
            )
            for text in texts
        ]
        began = time.perf_counter()
        answers = uvloop.run(all_at_once(self._port, prepared, timeout_s=ROUND_S))
        seconds = time.perf_counter() - began
        return Round(
            tokens=sum(map(_completion_tokens, answers)),
            seconds=seconds,
            latencies_s=[answer.latency_s for answer in answers],
        )

    def accepts(self) -> bool:
        ask = request("GET", "/readyz", port=self._port)
        return uvloop.run(all_at_once(self._port, [ask], timeout_s=10))[0].status == 200


def _completion_tokens(answer: Answer) -> int:
    if answer.status != 200:
        raise BenchError(f"a chat was answered with {answer.status}: {answer.body[:300]!r}")
    return int(json.loads(answer.body)["usage"]["completion_tokens"])


class Offline:
    """A process that runs the engine alone: `own`, or transformers' as the `reference`."""

    def __init__(self, lab: Lab, label: str, engine: str) -> None:
        self.label = label
        command = python("loadtests.baseline_offline", engine)
        self.child = lab.start(command, name=f"offline-{engine}", piped=True)

    def await_ready(self) -> None:
        self.child.read_json()

    def run(self, texts: list[str], max_tokens: int) -> Round:
        line = json.dumps({"prompts": texts, "max_tokens": max_tokens})
        self.child.stdin.write(line.encode() + b"\n")
        self.child.stdin.flush()
        answer = self.child.read_json()
        return Round(tokens=answer["tokens"], seconds=answer["seconds"])


def _idle_cores(child: Child) -> float:
    """Processors that a stack without work keeps busy."""
    before = cpu_times_s(child)
    time.sleep(IDLE_S)
    return spent_s(before, cpu_times_s(child)) / IDLE_S


def measure(stack: Stack, *offline: Offline) -> dict[str, list[Round]]:
    """Rounds of all sides, every second one in the opposite order."""
    sides: list[Stack | Offline] = [stack, *offline]
    rounds: dict[str, list[Round]] = {side.label: [] for side in sides}
    began = time.monotonic()
    for number in range(ROUNDS):
        if time.monotonic() - began > BUDGET_S:
            say(f"{BUDGET_S:g} s are over; {number} rounds must do")
            break
        texts = prompts(number)
        for side in reversed(sides) if number % 2 else sides:
            with stopped(*(other.child for other in sides if other is not side)):
                before = cpu_times_s(side.child)
                done = side.run(texts, MAX_TOKENS)
                done.cpu_s = spent_s(before, cpu_times_s(side.child))
            until(stack.accepts, what="the stack to be ready again", child=stack.child)
            rounds[side.label].append(done)
            say(f"round {number + 1}/{ROUNDS} {side.label}: {done.rate:,.0f} tokens/s")
    return rounds


def _row(label: str, rounds: list[Round]) -> list[str]:
    rates = [done.rate for done in rounds]
    latencies = [latency for done in rounds for latency in done.latencies_s]
    return [
        label,
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{statistics.median(done.tokens for done in rounds):,.0f}",
        f"{statistics.median(done.cpu_s / done.tokens for done in rounds) * 1000:.1f}",
        f"{percentile(latencies, 50):.1f} / {max(latencies):.1f}" if latencies else "",
    ]


def main() -> int:
    where = conditions("torch", "transformers", "aiohttp", "celery")
    # A worker sets this for itself, the offline side inherits it: their threads wait alike.
    pin(Settings())
    with Lab() as lab:
        stack = Stack(lab)
        alone = Offline(lab, "the engine alone", "own")
        reference = Offline(lab, "transformers' generate_batch", "reference")
        for side in (stack, alone, reference):
            side.await_ready()
            side.run(prompts(ROUNDS), WARMUP_TOKENS)
            say(f"{side.label} is warm")
        idle = _idle_cores(stack.child)
        rounds = measure(stack, alone, reference)
    ours = rounds[stack.label]
    rates = {label: [done.rate for done in found] for label, found in rounds.items()}
    figures = {
        "stack_vs_engine_64": median_ratio(rates[stack.label], rates[alone.label]),
        "stack_vs_generate_batch_64": median_ratio(rates[stack.label], rates[reference.label]),
    }
    print(f"{CHATS} concurrent chats of {MAX_TOKENS} tokens, {MODEL}, greedy, {len(ours)} rounds")
    print(f"{where}\nThe idle stack keeps {idle:.2f} cores busy; it is stopped meanwhile.\n")
    headings = [
        "side",
        "tokens/s (median)",
        "rounds",
        "tokens a round",
        "CPU ms a token",
        "latency p50 / max s",
    ]
    print(table(headings, [_row(label, done) for label, done in rounds.items()]), end="\n\n")
    return report("engine", figures, BARS)


if __name__ == "__main__":
    run(main)
