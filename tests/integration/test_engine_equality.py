"""120 prompts of a real model, one by one and together, against `generate`.

Run by `make test-engine`. Takes minutes, so that `make test` has a shorter one in
`test_engine_attention.py`.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from tests.integration.real_models import real_model
from workers.admission import Sampling
from workers.engines import attention
from workers.engines.batching import BatchingLoop, batching_config
from workers.engines.decoder import Decoder
from workers.loader import load_model, load_tokenizer

# Threads that wait for each other would spin; see workers.pinning.
torch.set_num_threads(1)

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.environ.get("ENGINE") != "1", reason="takes minutes; run by `make test-engine`"
    ),
]

TOKENS = 12
#: Mixed lengths in tokens, shorter and longer than a page and than a step.
LENGTHS = [5, 9, 17, 31, 32, 33, 48, 64, 65, 90, 128, 200, 330, 600]


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any, list[list[int]], list[list[int]]]:
    """The catalogue entry, its model in float32, prompts, and what `generate` makes of them."""
    spec, folder = real_model("smollm2-135m")
    model: Any = load_model(spec, folder, dtype=torch.float32, where=torch.device("cpu"))
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer = load_tokenizer(folder)
    text = "The harbour was calm, the wind came from the west, and nobody on deck slept. " * 60
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(120)]
    prompts = [
        # Every third one begins as others do.
        tokenizer((f"Ship {number}: " if number % 3 else "") + text).input_ids[:length]
        for number, length in enumerate(lengths)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    # Those of one length go together, which needs no padding.
    for length in set(map(len, prompts)):
        alike = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[number] for number in alike])
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
            )
        for number, answer in zip(alike, made[:, length:].tolist(), strict=True):
            answers[number] = answer
    return spec, model, prompts, answers


def _answers(known: tuple[Any, Any, Any, Any], *, sharing: bool, together: int) -> list[list[int]]:
    spec, model, prompts, _ = known
    config = batching_config(spec, model.device)
    config.allow_block_sharing = sharing
    found: dict[str, list[int]] = {}
    room = threading.Semaphore(together)

    def deliver(outputs: list[Any]) -> None:
        for output in outputs:
            found[output.request_id] = list(output.generated_tokens)
            room.release()

    loop = BatchingLoop(
        model,
        config,
        deliver=deliver,
        on_step=lambda _: None,
        threads=1,
        own_attention=True,
        decoder=Decoder(model),
    )
    loop.start()
    try:
        for number, prompt in enumerate(prompts):
            assert room.acquire(timeout=120)
            assert loop.add(
                str(number),
                prompt,
                max_tokens=TOKENS,
                sampling=Sampling(temperature=0.0),
                every_token=False,
            )
        for _ in range(together):
            assert room.acquire(timeout=120)
    finally:
        loop.abandon()
        loop.join(0.0, timeout=30)
        attention.switch_back(model)
    return [found[str(number)] for number in range(len(prompts))]


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
@pytest.mark.parametrize("together", [64, 16, 1])
def test_answers_are_those_of_generate(
    known: tuple[Any, Any, Any, Any], sharing: bool, together: int
) -> None:
    assert _answers(known, sharing=sharing, together=together) == known[3]
