"""Worker processes, the operations console, and what all of them log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr

from config.sections.base import Port, Positive, Seconds, Section


class Worker(Section):
    """One Celery worker process."""

    #: `transformers`, or `simulated` (no model; says so everywhere).
    engine: Literal["transformers", "simulated"] = "transformers"
    #: Interpreter of workers whose model has `engine = "vllm"`; empty: the launcher's own.
    vllm_python: str = ""
    #: Time for running jobs to finish after SIGTERM before they are handed back.
    grace_s: Seconds = 8.0
    #: Own listener for `/metrics`; 0 leaves it off.
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = 0
    #: torch threads; 0 lets torch decide.
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    #: Processors the process is bound to, such as `0-3,8`; empty leaves it free.
    cpus: Annotated[str, Field(pattern=r"^(\d+(-\d+)?(,\d+(-\d+)?)*)?$")] = ""
    #: Memory it may take of its CUDA device; 0: all that is free.
    device_memory_mib: Annotated[int, Field(ge=0)] = 0
    #: What `forebay workers` shows as the place it runs; empty: what the process finds out.
    place: Annotated[str, Field(max_length=200)] = ""
    #: On the CPU a step that generates answers takes no more of new prompts than fits this time, so
    #: that streams go on evenly beside long prompts; more of it serves prompts sooner.
    max_step_ms: Annotated[float, Field(ge=1, le=10_000)] = 120.0
    #: Attention on the CPU: `compiled` for AVX-512 (built at first use, needs a C++ compiler),
    #: `torch`, or `auto`, which compiles where it can.
    kernel: Literal["auto", "torch", "compiled"] = "auto"
    #: Longest a token delta waits for others before it is published.
    flush_interval_ms: Positive = 20
    #: Engine steps may stand still for this long while jobs run before the engine counts as dead.
    stall_s: Seconds = 60.0
    #: Celery task events, which Flower's task page shows; they cost throughput above ~1,000 jobs/s.
    task_events: bool = True


class Simulated(Section):
    """Step-time model of the simulated engine; says nothing about a real model.

    A step takes `step_ms + step_ms_per_sequence * running + prefill_ms_per_token * new prompt
    tokens` and gives every running sequence one token.
    """

    step_ms: Annotated[float, Field(ge=0)] = 20.0
    step_ms_per_sequence: Annotated[float, Field(ge=0)] = 0.3
    prefill_ms_per_token: Annotated[float, Field(ge=0)] = 0.05
    #: Sequences in one step; 0 takes the model's `max_batch`.
    capacity: Annotated[int, Field(ge=0, le=4096)] = 0


class Flower(Section):
    """The operations console."""

    host: str = "127.0.0.1"
    port: Port = 5555
    #: `user:password`; required when `host` is not a loopback address.
    basic_auth: SecretStr = SecretStr("")
    #: Tenants shown as rows of their own.
    top_tenants: Annotated[int, Field(ge=0, le=1000)] = 20


class Log(Section):
    """Log lines on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    #: `auto` is readable on a terminal and JSON elsewhere.
    format: Literal["auto", "json", "console"] = "auto"
