"""Makes the engine that a model asks for. Only the modules of that engine are imported."""

from __future__ import annotations

from collections.abc import Callable

from config.catalogue import ModelSpec
from config.settings import Settings
from workers.engine import Engine


def make_engine(
    settings: Settings,
    spec: ModelSpec,
    *,
    on_stage: Callable[[str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_lost: Callable[[], None] | None = None,
    on_dead: Callable[[], None] | None = None,
    on_kernel: Callable[[str], None] | None = None,
) -> Engine:
    """The engine of a model, not started yet; its files are here.

    `on_stage` hears of `loading` and, while the engine starts, of `warming`; `on_step` gets the
    requests of each step, `on_lost` is called when the engine was lost, `on_dead` when it can't be
    rebuilt; `on_kernel` gets what computes a chat model's steps. Raises `SourceError`.
    """
    say = on_stage or (lambda _: None)
    if settings.worker.engine == "simulated":
        from workers.engines.simulated import SimulatedEngine

        return SimulatedEngine(spec, settings.simulated, on_step=on_step)
    from workers.loader import limit_memory
    from workers.sources import ensure

    folder = ensure(spec, settings.models)
    say("loading")
    if spec.engine == "vllm":
        from workers.engines.vllm import VllmEngine

        return VllmEngine(
            spec,
            folder,
            device_memory_mib=settings.worker.device_memory_mib,
            stall_s=settings.worker.stall_s,
            on_loaded=lambda: say("warming"),
            on_lost=on_lost,
            on_dead=on_dead,
        )
    limit_memory(settings.worker.device_memory_mib)
    if spec.kind != "chat":
        from workers.engines.encoder import EncoderEngine

        return EncoderEngine(
            spec,
            folder,
            threads=settings.worker.threads,
            stall_s=settings.worker.stall_s,
            on_loaded=lambda: say("warming"),
            on_step=on_step,
            on_lost=on_lost,
            on_dead=on_dead,
        )
    from workers.engines.continuous import ContinuousEngine

    return ContinuousEngine(
        spec,
        folder,
        threads=settings.worker.threads,
        stall_s=settings.worker.stall_s,
        on_loaded=lambda: say("warming"),
        step_ms=settings.worker.max_step_ms,
        kernel=settings.worker.kernel,
        models=settings.models,
        on_step=on_step,
        on_lost=on_lost,
        on_dead=on_dead,
        on_kernel=on_kernel,
    )
