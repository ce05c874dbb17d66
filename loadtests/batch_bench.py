"""A batch of 50,000 lines: how long it takes, and what it costs the API process that drives it.

One API process, one worker with the simulated engine (a step takes a millisecond, 64 at once) and
Valkey. Meanwhile a client asks for interactive answers, one after another, as it does before the
batch: what the driver adds to their time is what the batch costs everybody else.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field

import openai
import psutil

from broker.connections import connect
from config.settings import Redis
from loadtests.harness import Bar, BenchError, conditions, percentile, report, say, table
from loadtests.lab import Child, Lab, free_port, listening, python, run, until
from loadtests.stack import MODEL, api_env, create_key, request_body, worker_env

LINES = int(os.environ.get("LINES", "50000"))
CAPACITY = 64
STEP_MS = 1.0
#: Interactive calls before the batch.
CALM_CALLS = 100
#: Pause of the interactive client between two calls.
PAUSE_S = 0.05
LIMIT_S = 440.0

BARS = (
    Bar(figure="lost", relation="at most", limit=0),
    Bar(figure="doubled", relation="at most", limit=0),
    Bar(figure="rss_growth_mib", relation="at most", limit=64),
)


@dataclass(slots=True)
class Watch:
    """Reads an API process's memory, and waits for interactive answers, until it is stopped."""

    client: openai.OpenAI
    process: psutil.Process
    stop: threading.Event = field(default_factory=threading.Event)
    rss: list[int] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)

    def run(self, calls: int | None = None) -> None:
        for _ in range(calls) if calls else itertools.count():
            if self.stop.is_set():
                return
            began = time.monotonic()
            self.client.chat.completions.create(**request_body("interactive"))
            self.waits_ms.append((time.monotonic() - began) * 1000)
            self.rss.append(self.process.memory_info().rss)
            self.stop.wait(PAUSE_S)


def main() -> int:
    say(conditions("aiohttp", "redis", "openai"))
    with Lab() as lab:
        url = lab.redis()
        env = {
            **api_env(url, lab.folder),
            "FOREBAY_DATA_DIR": str(lab.folder),
            "FOREBAY_API__PORT": str(free_port()),
        }
        key = create_key(env)
        api = lab.start(python("api"), name="api", env=env)
        worker = worker_env(url, capacity=CAPACITY, step_ms=STEP_MS)
        lab.start(python("workers", "--model", MODEL), name="worker", env=worker)
        port = int(env["FOREBAY_API__PORT"])
        until(lambda: listening(port), what="the API", child=api)
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=60, max_retries=0
        ) as client:
            return _measure(client, api, url)


def _measure(client: openai.OpenAI, api: Child, redis_url: str) -> int:
    process = psutil.Process(api.process.pid)
    calm = Watch(client, process)
    calm.run(10)
    calm.waits_ms.clear()
    calm.run(CALM_CALLS)
    before, cpu_before = process.memory_info().rss, api.cpu_s()
    say(f"{LINES} lines: upload")
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        for number in range(LINES):
            line = {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": request_body(f"question number {number} " + "x" * 400),
            }
            file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        size = file.tell()
        file.seek(0)
        began = time.monotonic()
        uploaded = client.files.create(file=("in.jsonl", file.file), purpose="batch")
    upload_s = time.monotonic() - began
    busy = Watch(client, process)
    watching = threading.Thread(target=busy.run)
    watching.start()
    try:
        began = time.monotonic()
        batch = client.batches.create(
            input_file_id=uploaded.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
        validated_s = 0.0
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            api.check()
            if time.monotonic() - began > LIMIT_S:
                raise BenchError(f"not done after {LIMIT_S:g} s: {batch.request_counts}")
            time.sleep(0.25)
            batch = client.batches.retrieve(batch.id)
            if batch.status != "validating" and not validated_s:
                validated_s = time.monotonic() - began
        took_s = time.monotonic() - began
    finally:
        busy.stop.set()
        watching.join()
    cpu_s = api.cpu_s() - cpu_before
    if batch.status != "completed" or batch.output_file_id is None:
        raise BenchError(f"the batch is {batch.status}: {batch.errors}")
    ids = []
    with client.files.with_streaming_response.content(batch.output_file_id) as content:
        ids = [json.loads(line)["custom_id"] for line in content.iter_lines()]
    with connect(Redis(url=redis_url)) as redis_client:
        redis_mib = redis_client.info("memory")["used_memory"] / 2**20
    figures = {
        "lines": LINES,
        "seconds": took_s,
        "lines_per_s": LINES / took_s,
        "lost": LINES - len(set(ids)),
        "doubled": len(ids) - len(set(ids)),
        "validated_s": validated_s,
        "upload_s": upload_s,
        "api_cpu_ms_per_line": cpu_s * 1000 / LINES,
        "rss_before_mib": before / 2**20,
        "rss_growth_mib": (max(busy.rss) - before) / 2**20,
        "redis_mib": redis_mib,
        "calm_p50_ms": percentile(calm.waits_ms, 50),
        "calm_p99_ms": percentile(calm.waits_ms, 99),
        "busy_p50_ms": percentile(busy.waits_ms, 50),
        "busy_p99_ms": percentile(busy.waits_ms, 99),
    }
    say(f"input of {size / 2**20:.1f} MiB")
    print(table(("figure", "value"), [(k, f"{v:.4g}") for k, v in figures.items()]))
    return report("batch", figures, BARS)


if __name__ == "__main__":
    run(main)
