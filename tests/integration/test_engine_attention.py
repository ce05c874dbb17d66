"""Forebay's attention in the batching loop: the tokens of `generate` and of the reference path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from config.catalogue import ModelSpec
from config.settings import Models
from tests.conftest import PATIENCE_S
from tests.integration.real_models import real_model
from workers.admission import Sampling
from workers.engines import attention
from workers.engines.batching import BatchingLoop, batching_config
from workers.engines.decoder import Decoder, heads_of
from workers.engines.kernels import native
from workers.engines.kernels.native import Kernel
from workers.engines.sampling import SamplingProcessors
from workers.loader import load_model, load_tokenizer

# Threads that wait for each other would spin; see workers.pinning.
torch.set_num_threads(1)

GREEDY = Sampling(temperature=0.0)
SPEC = ModelSpec(
    name="any", kind="chat", source="path:any", context_tokens=2048, max_batch=64, cache_tokens=8192
)

Prompts = list[list[int]]


class Run:
    """One loop over a model; `own` attention or the reference, `forward` the own forward pass.

    `kernel` is what that one computes attention with.
    """

    def __init__(
        self,
        model: Any,
        *,
        own: bool,
        forward: bool = False,
        sharing: bool = True,
        kernel: Kernel | None = None,
    ) -> None:
        config = batching_config(SPEC, model.device)
        config.allow_block_sharing = sharing
        #: Called in the loop's thread for every output.
        self.on_output: Callable[[Any], None] = lambda _: None
        self.results: dict[str, list[int]] = {}
        self._changed = threading.Condition()
        self._model = model
        self.loop = BatchingLoop(
            model,
            config,
            deliver=self._deliver,
            on_step=lambda _: None,
            threads=1,
            own_attention=own,
            decoder=Decoder(model, kernel) if forward else None,
        )

    def __enter__(self) -> Run:
        self.loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.abandon()
        self.loop.join(0.0, timeout=PATIENCE_S)
        attention.switch_back(self._model)

    def add(self, name: str, prompt: list[int], max_tokens: int, *, every: bool = False) -> None:
        assert self.loop.add(
            name, prompt, max_tokens=max_tokens, sampling=GREEDY, every_token=every
        )

    def _deliver(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.on_output(output)
            if output.is_finished() or output.error is not None:
                with self._changed:
                    self.results[output.request_id] = list(output.generated_tokens)
                    self._changed.notify()

    def wait(self, *names: str) -> list[list[int]]:
        with self._changed:
            assert self._changed.wait_for(
                lambda: set(names) <= set(self.results), timeout=3 * PATIENCE_S
            )
        return [self.results[name] for name in names]

    def batch(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        names = [str(number) for number in range(len(prompts))]
        self.results.clear()
        for name, prompt in zip(names, prompts, strict=True):
            self.add(name, prompt, max_tokens)
        return self.wait(*names)


def _generate(model: Any, prompts: Prompts, max_tokens: int) -> list[list[int]]:
    """By transformers' `generate`; prompts that are as long as each other go together."""
    answers: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        numbers = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in numbers])
        with torch.no_grad():
            outputs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        answers |= dict(zip(numbers, outputs[:, length:].tolist(), strict=True))
    return [answers[i] for i in range(len(prompts))]


def _tiny(kind: type[LlamaConfig | Qwen2Config | Qwen3Config] = LlamaConfig, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        # Large enough for tokens to depend on each other.
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = kind(**fields | changes, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_config(config).eval()


def _random_prompts(lengths: list[int]) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return _tiny()


MIXED = [length for length in (1, 2, 31, 32, 33, 64, 90, 129, 200, 260) for _ in range(5)]


@pytest.fixture(scope="module")
def mixed(tiny: Any) -> tuple[Prompts, list[list[int]]]:
    prompts = _random_prompts(MIXED)
    return prompts, _generate(tiny, prompts, 12)


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
def test_a_batch_gets_the_tokens_of_generate_and_of_the_reference(
    tiny: Any, mixed: tuple[Prompts, list[list[int]]], sharing: bool
) -> None:
    prompts, expected = mixed
    with Run(tiny, own=True, sharing=sharing) as run:
        assert tiny.config._attn_implementation == attention.NAME
        assert run.batch(prompts, 12) == expected
    with Run(tiny, own=True, forward=True, sharing=sharing) as run:
        assert run.batch(prompts, 12) == expected
    with Run(tiny, own=False, sharing=sharing) as run:
        assert tiny.config._attn_implementation == "sdpa"
        assert run.batch(prompts, 12) == expected


def _kernel(model: Any) -> Kernel:
    kernel = native.choose("auto", Models(), heads_of(model))
    return kernel or pytest.skip("the kernel can't be had here")


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
def test_the_kernel_gives_the_same(
    tiny: Any, mixed: tuple[Prompts, list[list[int]]], sharing: bool
) -> None:
    prompts, expected = mixed
    with Run(tiny, own=True, forward=True, sharing=sharing, kernel=_kernel(tiny)) as run:
        assert run.batch(prompts, 12) == expected
        run.results.clear()
        for number in range(0, len(prompts), 10):
            run.add(str(number), prompts[number], 12)
            assert run.wait(str(number)) == [expected[number]]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_the_kernel_takes_a_long_prompt_in_parts_beside_others(kind: type[LlamaConfig]) -> None:
    model = _tiny(kind, num_attention_heads=6, num_key_value_heads=2)
    prompts = _random_prompts([20, 20, 20, 1300, 700])
    expected = _generate(model, prompts, 24)
    with Run(model, own=True, forward=True, kernel=_kernel(model)) as run:
        generating = threading.Event()
        run.on_output = lambda output: generating.set()
        for number in range(3):
            run.add(str(number), prompts[number], 24, every=True)
        assert generating.wait(30)
        for number in range(3, 5):
            run.add(str(number), prompts[number], 24)
        assert run.wait(*map(str, range(5))) == expected


def test_a_decoder_goes_on_without_the_weights_of_its_model() -> None:
    model = _tiny()
    prompts = _random_prompts([20, 70])
    expected = _generate(model, prompts, 8)
    with Run(model, own=True, forward=True) as run:
        decoder = run.loop._decoder
        assert decoder is not None
        before = sum(each.numel() for each in model.parameters())
        decoder.release(model)
        assert sum(each.numel() for each in model.parameters()) < before / 2
        assert run.batch(prompts, 8) == expected


def test_a_request_alone_gets_the_same(tiny: Any, mixed: tuple[Prompts, list[list[int]]]) -> None:
    prompts, expected = mixed
    with Run(tiny, own=True, forward=True) as run:
        for number in range(0, len(prompts), 5):
            run.add(str(number), prompts[number], 12)
            assert run.wait(str(number)) == [expected[number]]


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("forward", [True, False], ids=["own forward", "layers"])
def test_heads_may_share_keys(
    kind: type[LlamaConfig], heads: tuple[int, int], forward: bool
) -> None:
    model = _tiny(kind, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    prompts = _random_prompts([3, 3, 70, 70])
    with Run(model, own=True, forward=forward) as run:
        answers = run.batch(prompts, 8)
    assert answers == _generate(model, prompts, 8)


def test_biases_of_linear_layers_count() -> None:
    model = _tiny(Qwen2Config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias, std=2.0)
    prompts = _random_prompts([3, 3, 70, 70])
    with Run(model, own=True, forward=True) as run:
        answers = run.batch(prompts, 8)
    assert answers == _generate(model, prompts, 8)


def test_a_prompt_longer_than_a_step_joins_running_requests(tiny: Any) -> None:
    prompts = _random_prompts([20, 20, 20, 1300, 700])
    expected = _generate(tiny, prompts, 24)
    with Run(tiny, own=True, forward=True) as run:
        generating = threading.Event()
        run.on_output = lambda output: generating.set()
        for number in range(3):
            run.add(str(number), prompts[number], 24, every=True)
        assert generating.wait(30)
        for number in range(3, 5):
            run.add(str(number), prompts[number], 24)
        assert run.wait(*map(str, range(5))) == expected


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
def test_requests_with_a_common_beginning(tiny: Any, sharing: bool) -> None:
    start, *ends = _random_prompts([100, 1, 7, 40, 40, 300])
    prompts = [start + end for end in ends]
    expected = _generate(tiny, prompts, 12)
    with Run(tiny, own=True, sharing=sharing) as run:
        run.add("first", prompts[0], 12)
        assert run.wait("first") == [expected[0]]
        assert run.batch(prompts, 12) == expected
        # The first may have been sent again; all find the three full pages of the beginning.
        found = [run.loop.cached.get(str(number), 0) for number in range(len(prompts))]
    assert all(tokens >= 96 for tokens in found) if sharing else not any(found)


def test_a_cancelled_request_leaves_the_others_alone(tiny: Any) -> None:
    prompts = _random_prompts([40, 41, 42, 43, 44, 45])
    expected = _generate(tiny, prompts, 20)
    with Run(tiny, own=True) as run:

        def cancel(output: Any) -> None:
            if output.request_id == "gone" and len(output.generated_tokens) == 5:
                run.loop.cancel_request("gone")

        run.on_output = cancel
        run.add("gone", prompts[0], 1000, every=True)
        assert run.batch(prompts, 20) == expected
        # Its pages go to somebody else now.
        assert run.batch([prompts[0] * 12], 20) == _generate(tiny, [prompts[0] * 12], 20)
        assert "gone" not in run.results


# -- transformers' inner names ---------------------------------------------------------------------
def test_transformers_has_what_is_relied_on(tiny: Any) -> None:
    with Run(tiny, own=False) as run:
        run.batch(_random_prompts([5]), 1)
        processor = run.loop.batch_processor
        assert attention._lacking(processor) == []
        allocator = processor.cache.layer_to_allocator[0]
        del allocator._kv_token_views
        assert attention._lacking(processor) == ["FullAttentionCacheAllocator._kv_token_views"]


def test_without_them_the_reference_serves(
    tiny: Any, mixed: tuple[Prompts, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, expected = mixed
    monkeypatch.setattr(attention, "_lacking", lambda _: ["Cache.update"])
    with Run(tiny, own=True) as run:
        assert run.batch(prompts[20:24], 12) == expected[20:24]
        assert tiny.config._attn_implementation == "sdpa"


def test_layers_with_a_window_keep_the_reference() -> None:
    model = _tiny(Qwen3Config, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    prompts = _random_prompts([40, 40])
    with Run(model, own=True) as run:
        answers = run.batch(prompts, 8)
        assert model.config._attn_implementation == "sdpa"
    assert answers == _generate(model, prompts, 8)


def test_other_kinds_of_models_keep_the_reference(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention.suits(tiny)
    monkeypatch.setattr(tiny.config, "model_type", "gemma2")
    assert not attention.suits(tiny)


# -- a real model ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    spec, folder = real_model("smollm2-135m")
    model = load_model(spec, folder, dtype=torch.float32, where=torch.device("cpu"))
    # Answers as long as asked for.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model, load_tokenizer(folder)


def _texts(tokenizer: Any, lengths: list[int]) -> Prompts:
    """Prompts of the given lengths in tokens, each different from its first words on."""
    return [
        tokenizer(
            f"Log of ship {number}, {number * 7 % 30} sailors. "
            + "The harbour was calm, the wind came from the west, and nobody on deck slept. " * 20
        ).input_ids[:length]
        for number, length in enumerate(lengths)
    ]


@pytest.mark.model
def test_a_real_model_gives_the_tokens_of_generate(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    lengths = [length for length in (8, 16, 31, 32, 33, 64) for _ in range(4)]
    prompts = _texts(tokenizer, [*lengths, 140])
    expected = _generate(model, prompts, 5)
    with Run(model, own=True, forward=True) as run:
        assert run.batch(prompts, 5) == expected
    with Run(model, own=False) as run:
        assert run.batch(prompts, 5) == expected
    if kernel := native.choose("auto", Models(), heads_of(model)):
        with Run(model, own=True, forward=True, kernel=kernel) as run:
            assert run.batch(prompts[::4], 5) == expected[::4]


class Forced(SamplingProcessors):
    """Makes every request go on with given tokens, and keeps what the model thought of each."""

    def __init__(self, answers: dict[str, list[int]]) -> None:
        super().__init__()
        self._answers = answers
        self.thoughts: dict[str, list[torch.Tensor]] = {name: [] for name in answers}
        self._rows: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Any) -> Any:
        self._rows = [each.state.request_id for each in requests_in_batch if each.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Any, scores: torch.Tensor, logits_processor_args: Any) -> Any:
        for row, name in enumerate(self._rows):
            thoughts = self.thoughts[name]
            thoughts.append(scores[row].log_softmax(-1))
            scores[row, self._answers[name][len(thoughts) - 1]] = torch.inf
        return scores


def _forced(
    model: Any,
    prompts: Prompts,
    answers: list[list[int]],
    *,
    own: bool,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Log-probabilities of every next token, [request * position, token]."""
    named = {str(number): answer for number, answer in enumerate(answers)}
    run = Run(model, own=own, forward=own, kernel=kernel)
    run.loop.logit_processor = processor = Forced(named)
    with run:
        assert run.batch(prompts, len(answers[0])) == answers
    return torch.stack([each for name in named for each in processor.thoughts[name]])


@pytest.mark.model
def test_bfloat16_is_as_close_to_float32_as_the_reference(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    prompts = _texts(tokenizer, [20, 20, 20, 20, 40, 40, 40, 150])
    answers = _generate(model, prompts, 12)
    exact = _forced(model, prompts, answers, own=False)
    model.to(torch.bfloat16)
    try:
        ways = {"torch": _forced(model, prompts, answers, own=True)}
        if kernel := native.choose("auto", Models(), heads_of(model)):
            ways["compiled"] = _forced(model, prompts, answers, own=True, kernel=kernel)
        reference = _forced(model, prompts, answers, own=False)
    finally:
        model.to(torch.float32)

    def distance(found: torch.Tensor) -> tuple[float, float]:
        divergence = (exact.exp() * (exact - found)).sum(-1).mean()
        agreement = (found.argmax(-1) == exact.argmax(-1)).float().mean()
        return divergence.item(), agreement.item()

    reference_kl, reference_same = distance(reference)
    for way, found in ways.items():
        own_kl, own_same = distance(found)
        # torch's scores are rounded to bfloat16 before the softmax, the kernel's weights after it;
        # that costs some of what is tiny anyway.
        assert own_kl < 2 * reference_kl + 1e-4, way
        assert own_same >= reference_same - 0.02, way
