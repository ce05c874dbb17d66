"""Accepted jobs a second of one API process on one core, against two other servers of the same job.

The API does all of its work: authentication, validation, limits, the job record, the fair queue.
Baselines are FastAPI + Celery `send_task` on the stock Redis transport (the better of a sync and an
async handler) and, as a ceiling, bare aiohttp around one async script call. One server is measured
at a time, on its own core; load generator and Redis have the other one.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import uvloop

from loadtests.harness import Bar, conditions, median_ratio, report, say, table
from loadtests.http_load import Load, closed_loop, request
from loadtests.lab import (
    SERVER_CORE,
    Child,
    Lab,
    free_port,
    listening,
    pin_load,
    python,
    run,
    until,
)
from loadtests.stack import MODEL, api_env, create_key

CONNECTIONS = 32
ROUNDS = 6
WARMUP_S = 0.5
WINDOW_S = 3.0

BODY = {
    "endpoint": "/v1/chat/completions",
    "body": {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Explain in one paragraph why the sky is blue at noon."},
        ],
        "max_tokens": 64,
        "temperature": 0.7,
    },
    "priority": "standard",
    "metadata": {"origin": "bench"},
}

BARS = (
    Bar(figure="vs_fastapi_celery", relation="at least", limit=4.0),
    Bar(figure="vs_bare", relation="at least", limit=0.40),
)


@dataclass(kw_only=True, slots=True)
class Target:
    """A server, and what was measured of it."""

    label: str
    child: Child
    port: int
    prepared: bytes
    #: CPU time of the server per answer, by round.
    cpu_us: list[float] = field(default_factory=list)
    rounds: list[Load] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [load.per_second for load in self.rounds]

    def row(self) -> list[str]:
        accepted = statistics.median(self.rates)
        spread = f"{min(self.rates):,.0f}-{max(self.rates):,.0f}"
        p50 = statistics.median(load.latency_ms(50) for load in self.rounds)
        p99 = statistics.median(load.latency_ms(99) for load in self.rounds)
        cpu = statistics.median(self.cpu_us)
        busy = statistics.median(load.generator_busy for load in self.rounds)
        return [
            self.label,
            f"{accepted:,.0f}",
            spread,
            f"{p50:.1f}",
            f"{p99:.1f}",
            f"{cpu:.0f}",
            f"{busy:.0%}",
        ]


def _fastapi(lab: Lab) -> tuple[Child, int]:
    port = free_port()
    argv = python("uvicorn", "loadtests.baseline_fastapi:app", "--port", str(port))
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "error"]
    url = lab.redis(name="valkey-fastapi")
    env = {"BASELINE_REDIS": url}
    return lab.start([*argv, *options], name="fastapi", core=SERVER_CORE, env=env), port


def _bare(lab: Lab) -> tuple[Child, int]:
    port = free_port()
    argv = python("loadtests.baseline_bare", str(port), lab.redis(name="valkey-bare"))
    return lab.start(argv, name="bare", core=SERVER_CORE), port


def _forebay(lab: Lab) -> tuple[Child, int, str]:
    port = free_port()
    env = api_env(lab.redis(name="valkey-forebay"), lab.folder)
    secret = create_key(env)
    env["FOREBAY_API__PORT"] = str(port)
    return lab.start(python("api"), name="forebay", core=SERVER_CORE, env=env), port, secret


def targets(lab: Lab) -> dict[str, Target]:
    """Start all servers and wait until they listen."""
    fastapi, fastapi_port = _fastapi(lab)
    bare, bare_port = _bare(lab)
    forebay, forebay_port, secret = _forebay(lab)
    for child, port in ((fastapi, fastapi_port), (bare, bare_port), (forebay, forebay_port)):
        until(lambda port=port: listening(port), what=f"{child.name} to listen", child=child)  # type: ignore[misc]

    def target(label: str, child: Child, port: int, path: str, **headers: str) -> Target:
        prepared = request("POST", path, port=port, body=BODY, headers=headers)
        return Target(label=label, child=child, port=port, prepared=prepared)

    bearer = {"Authorization": f"Bearer {secret}"}
    return {
        "forebay": target("Forebay: POST /v1/jobs", forebay, forebay_port, "/v1/jobs", **bearer),
        "sync": target("FastAPI + send_task, sync handler", fastapi, fastapi_port, "/sync"),
        "async": target("FastAPI + send_task, async handler", fastapi, fastapi_port, "/async"),
        "bare": target("bare aiohttp + one script call", bare, bare_port, "/submit"),
        "constant": target("bare aiohttp, constant answer", bare, bare_port, "/constant"),
    }


def measure(measured: dict[str, Target]) -> None:
    """All servers in turn, every second round in the opposite order."""
    for number in range(ROUNDS):
        order = list(measured.values())
        for target in reversed(order) if number % 2 else order:
            cpu_before = target.child.cpu_s()
            load = uvloop.run(
                closed_loop(
                    target.port,
                    target.prepared,
                    connections=CONNECTIONS,
                    warmup_s=WARMUP_S,
                    window_s=WINDOW_S,
                    expected=202,
                )
            )
            spent = target.child.cpu_s() - cpu_before
            target.cpu_us.append(spent / load.statuses.total() * 1e6)
            target.rounds.append(load)
            say(f"round {number + 1}/{ROUNDS} {target.label}: {load.per_second:,.0f}/s")


def main() -> int:
    where = conditions("aiohttp", "uvloop", "fastapi", "uvicorn", "celery", "redis")
    with Lab() as lab:
        pin_load()
        measured = targets(lab)
        measure(measured)
    forebay = measured["forebay"].rates
    figures = {
        "vs_fastapi_celery": min(
            median_ratio(forebay, measured[variant].rates) for variant in ("sync", "async")
        ),
        "vs_bare": median_ratio(forebay, measured["bare"].rates),
    }
    print(f"Accepting a job: one server core, {CONNECTIONS} connections, {ROUNDS} rounds")
    print(f"{where}\n")
    headings = [
        "server",
        "accepted/s (median)",
        "rounds",
        "p50 ms",
        "p99 ms",
        "CPU µs each",
        "generator busy",
    ]
    print(table(headings, [target.row() for target in measured.values()]), end="\n\n")
    return report("submit", figures, BARS)


if __name__ == "__main__":
    run(main)
