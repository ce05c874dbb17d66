"""120 prompts of a real model, one by one and together, against `generate`.

Run by `make test-engine`. Takes minutes, so that `make test` has a shorter one in
`test_engine_attention.py`. The prompts come in parts, each of which is a bounded piece of work:
`make test-engine PYTEST_ARGS="-k part2"` runs one.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from config.settings import Models
from tests.integration.real_models import real_model
from workers.admission import Sampling
from workers.engines import attention
from workers.engines.batching import BatchingLoop, batching_config
from workers.engines.decoder import Decoder, heads_of
from workers.engines.kernels import native
from workers.loader import load_model, load_tokenizer

# As a worker has them: 0005.
torch.set_num_threads(os.cpu_count() or 1)

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        os.environ.get("ENGINE") != "1", reason="takes minutes; run by `make test-engine`"
    ),
]

TOKENS = 8
PROMPTS = 120
PARTS = 4
#: Mixed lengths in tokens, shorter and longer than a page and than a step.
LENGTHS = [5, 9, 17, 31, 32, 33, 48, 64, 65, 90, 128, 200, 330, 600]

Tokens = list[list[int]]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, Any]:
    """The catalogue entry, its model in float32, its tokenizer."""
    # The catalogue's cache would be 3 GB in float32, which a busy machine may not have free.
    spec, folder = real_model("smollm2-135m", cache_tokens=16_384)
    model: Any = load_model(spec, folder, dtype=torch.float32, where=torch.device("cpu"))
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return spec, model, load_tokenizer(folder)


@pytest.fixture(scope="module", params=range(PARTS), ids=lambda part: f"part{part}")
def known(request: pytest.FixtureRequest, loaded: tuple[Any, Any, Any]) -> tuple[Tokens, Tokens]:
    """Some of the prompts, and what `generate` makes of them."""
    _, model, tokenizer = loaded
    text = "The harbour was calm, the wind came from the west, and nobody on deck slept. " * 60
    prompts = [
        # Every third one begins as others do.
        tokenizer((f"Ship {number}: " if number % 3 else "") + text).input_ids[
            : LENGTHS[number % len(LENGTHS)]
        ]
        for number in range(request.param, PROMPTS, PARTS)
    ]
    answers: Tokens = [[] for _ in prompts]
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
    return prompts, answers


@pytest.fixture(scope="module", params=["torch", "compiled"])
def computed(request: pytest.FixtureRequest, loaded: tuple[Any, Any, Any]) -> Decoder:
    """The own forward pass, without and with the compiled kernel."""
    _, model, _ = loaded
    if request.param == "torch":
        return Decoder(model)
    kernel = native.choose("auto", Models(), heads_of(model))
    if kernel is None:
        pytest.skip("the kernel can't be had here")
    return Decoder(model, kernel)


def _answers(
    loaded: tuple[Any, Any, Any], by: Decoder, prompts: Tokens, *, sharing: bool, together: int
) -> Tokens:
    spec, model, _ = loaded
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
        threads=os.cpu_count() or 1,
        own_attention=True,
        decoder=by,
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
@pytest.mark.parametrize("together", [30, 8, 1], ids=["together", "by eights", "alone"])
def test_answers_are_those_of_generate(
    loaded: tuple[Any, Any, Any],
    known: tuple[Tokens, Tokens],
    computed: Decoder,
    sharing: bool,
    together: int,
) -> None:
    prompts, expected = known
    assert _answers(loaded, computed, prompts, sharing=sharing, together=together) == expected
