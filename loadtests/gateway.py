"""What a gateway adds to a request, against the engine's own server: Forebay, and LiteLLM's proxy.

The same simulated engine answers all of them: behind aiohttp and nothing else (bare), in Forebay's
worker, and, for LiteLLM, the bare server. Each gateway is loaded at random moments with half of
what it was seen to manage at most, the bare server with the same requests at the same moments.
Added is the difference of the percentiles, the median over the rounds. Only synchronous
chat completions, since LiteLLM has no others. LiteLLM lives in an environment of its own and is
named absent when that isn't there.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import uvloop

from loadtests.fronts import Front
from loadtests.harness import Bar, conditions, percentile, report, say, table
from loadtests.http_load import closed_loop, request
from loadtests.lab import (
    LOAD_CORE,
    ROOT,
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
from loadtests.paced import paced
from loadtests.stack import MODEL, request_body

#: Four steps of 5 ms and, on average, half of one until the first begins.
STEP_MS = 5.0
TOKENS = 4
SLOTS = 64
ROUNDS = 3
WINDOW_S = 6.0
#: With which, and in which, the most a gateway manages is found: so many that none waits for them.
CONNECTIONS = 48
MAXIMUM_S = 4.0
LITELLM = ROOT / ".venv-litellm" / "bin" / "litellm"
_KEY = "sk-bench-of-a-gateway"

BARS = (
    Bar(figure="p50_ms", relation="at most", limit=2),
    Bar(figure="p95_ms", relation="at most", limit=8),
    Bar(figure="p99_ms", relation="at most", limit=13),
)


@dataclass(kw_only=True, slots=True)
class Gateway:
    """One way to the engine, and what was seen of it."""

    label: str
    port: int
    prepared: bytes
    maximum_per_s: float = 0.0
    #: Latencies in seconds by round: through the gateway, and bare at the same rate.
    through: list[list[float]] = field(default_factory=list)
    bare: list[list[float]] = field(default_factory=list)

    def added_ms(self, percent: float) -> float:
        return 1000 * statistics.median(
            percentile(mine, percent) - percentile(its, percent)
            for mine, its in zip(self.through, self.bare, strict=True)
        )

    def latency_ms(self, rounds: list[list[float]], percent: float) -> float:
        return 1000 * statistics.median(percentile(each, percent) for each in rounds)

    def row(self) -> list[str]:
        percents = (50, 95, 99)
        return [
            self.label,
            f"{self.maximum_per_s:,.0f}",
            f"{self.maximum_per_s / 2:,.0f}",
            " / ".join(f"{self.latency_ms(self.bare, each):.1f}" for each in percents),
            " / ".join(f"{self.latency_ms(self.through, each):.1f}" for each in percents),
            " / ".join(f"{self.added_ms(each):.1f}" for each in percents),
        ]


def _chat(port: int, key: str) -> bytes:
    body = request_body("Why is the sky blue?", max_tokens=TOKENS)
    headers = {"Authorization": f"Bearer {key}"}
    return request("POST", "/v1/chat/completions", port=port, body=body, headers=headers)


def _listen(child: Child, port: int) -> None:
    until(lambda: listening(port), what=f"{child.name} to listen", child=child, timeout_s=120)


def _litellm(lab: Lab, bare_port: int) -> Gateway | None:
    if not LITELLM.exists():
        return None
    port = free_port()
    config = lab.folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n- model_name: {MODEL}\n  litellm_params:\n    model: openai/{MODEL}\n"
        f"    api_base: http://127.0.0.1:{bare_port}/v1\n    api_key: none\n"
        f"general_settings:\n  master_key: {_KEY}\n"
    )
    child = lab.start(
        [str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)],
        name="litellm",
        core=SERVER_CORE,
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
    )
    _listen(child, port)
    return Gateway(label="LiteLLM proxy, master key", port=port, prepared=_chat(port, _KEY))


def measure(gateways: list[Gateway], bare_port: int) -> None:
    """The most each manages, then rounds in which gateway and bare server take turns."""
    bare = _chat(bare_port, "none")
    for gateway in gateways:
        load = uvloop.run(
            closed_loop(
                gateway.port,
                gateway.prepared,
                connections=CONNECTIONS,
                warmup_s=1.0,
                window_s=MAXIMUM_S,
                expected=200,
            )
        )
        gateway.maximum_per_s = load.per_second
        say(f"{gateway.label}: {load.per_second:,.0f}/s at most")
    if len(gateways) > 1:
        # Half of very different loads compares little: once at the other's as well.
        forebay, other = gateways
        same = Gateway(label="Forebay at that load", port=forebay.port, prepared=forebay.prepared)
        same.maximum_per_s = other.maximum_per_s
        gateways.append(same)
    for number in range(ROUNDS):
        for gateway in gateways:
            terms = {"per_s": gateway.maximum_per_s / 2, "seconds": WINDOW_S}
            # Whoever comes first in one round comes second in the next.
            for through in (True, False) if number % 2 else (False, True):
                port, prepared = (gateway.port, gateway.prepared) if through else (bare_port, bare)
                seen = uvloop.run(paced(port, prepared, seed=number, **terms))
                (gateway.through if through else gateway.bare).append(seen)
            say(f"round {number + 1}/{ROUNDS} {gateway.label}")


def main() -> int:
    where = conditions("aiohttp", "uvloop", "redis")
    with Lab() as lab:
        pin_load()
        bare_port = free_port()
        argv = python("loadtests.baseline_engine", str(bare_port), str(STEP_MS), str(SLOTS))
        _listen(lab.start(argv, name="bare", core=LOAD_CORE), bare_port)
        front = Front(lab, processes=1, slots=SLOTS, step_ms=STEP_MS)
        label = "Forebay: API, Valkey, worker"
        forebay = Gateway(label=label, port=front.port, prepared=_chat(front.port, front.key))
        litellm = _litellm(lab, bare_port)
        gateways = [forebay, *([litellm] if litellm else [])]
        measure(gateways, bare_port)
        front.close()
    figures = {f"p{each}_ms": forebay.added_ms(each) for each in (50, 95, 99)}
    if litellm is not None:
        figures |= {f"litellm_p{each}_ms": litellm.added_ms(each) for each in (50, 95, 99)}
    print(f"Added by a gateway at half of its own load; the engine takes {TOKENS} x {STEP_MS:g} ms")
    print(f"{where}\n")
    headings = [
        "gateway",
        f"most/s, {CONNECTIONS} connections",
        "load/s",
        "bare p50 / p95 / p99 ms",
        "through it",
        "added",
    ]
    print(table(headings, [each.row() for each in gateways]), end="\n\n")
    if litellm is None:
        print("LiteLLM could not be installed: absent\n")
    return report("gateway", figures, BARS)


if __name__ == "__main__":
    run(main)
