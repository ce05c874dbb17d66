"""Attention over the paged KV cache for the CPU, in place of transformers' SDPA path.

The SDPA path joins the keys of all requests of a step into one long sequence and masks those of
the others, so its work grows with the square of the batch. Here each request meets its own keys
only: requests that generate are taken together in buckets of like length, prompts one by one.
transformers still writes the cache and does everything else; what a step attends to is worked out
once, in a `Plan`, which reaches every layer through the model's keyword arguments.

Relies on inner names of transformers 5.24; `install` says which are missing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from workers.engines.plans import Bucket, Layout, Piece, Plan

#: Without "flash" in the name transformers would build a mask over all keys of the step.
NAME = "paged_cpu_flash"
#: Models whose attention is softmax(q k^T * scale) v and nothing more.
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
#: Rows of a prompt that are taken at once: at most, which bounds the part masked for nothing, and
#: by the scores held, since more of them than the caches hold cost several times as much each.
_TILE = 128
_TILE_SCORES = 2**21
_LEAST_ROWS = 16


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of a layer: [1, heads, queries, size] in, [1, queries, heads, size] out.

    Without a plan the model isn't in the batching loop, and SDPA does it.
    """
    if plan is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if isinstance(kwargs.get("cu_seq_lens_k"), dict):
        raise RuntimeError("the model did not write its keys to the cache")
    queries = query[0].transpose(0, 1) * (scaling or query.size(-1) ** -0.5)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend(plan, layer, queries, key[0], value[0]).unsqueeze(0), None


def attend(
    plan: Plan, layer: int, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention of a step, [query, head, size]; its keys and values are in the cache already.

    `queries` are scaled, [query, head, size]; `key` and `value` of the step [head, query, size].
    """
    keys, values = (cached.view(-1, cached.size(-1)) for cached in plan.views[layer])
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for bucket in plan.buckets:
        out[bucket.at] = _decode(bucket, queries, keys, values, heads=key.size(0))
    for prompt in plan.prompts:
        part = slice(prompt.start, prompt.start + prompt.queries)
        if prompt.rows is None:
            its_keys, its_values = key[:, part], value[:, part]
        else:
            shape = (key.size(0), prompt.length, -1)
            its_keys = keys.index_select(0, prompt.rows).view(shape)
            its_values = values.index_select(0, prompt.rows).view(shape)
        _prefill(queries[part], its_keys, its_values, out[part])
    return out


def _decode(
    bucket: Bucket, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, heads: int
) -> torch.Tensor:
    """[request, head, size] for one query each; the heads that share a key head go together."""
    mine = queries.index_select(0, bucket.at)
    count, _, size = mine.shape
    shape = (count * heads, bucket.length, size)
    scores = mine.view(count * heads, -1, size) @ keys.index_select(0, bucket.rows).view(
        shape
    ).transpose(1, 2)
    if bucket.absent is not None:
        scores.view(count, -1, bucket.length).masked_fill_(bucket.absent, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
    return (weights @ values.index_select(0, bucket.rows).view(shape)).view(count, -1, size)


def _prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the last `len(queries)` positions of one request, written to `out`."""
    heads, length, size = keys.shape
    count = len(queries)
    rows = max(_LEAST_ROWS, min(_TILE, _TILE_SCORES // (length * queries.size(1))))
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        # Keys up to the tile's last query; only those of the tile itself need a mask.
        seen = length - count + end
        own = end - begin
        tile = queries[begin:end].transpose(0, 1).reshape(heads, -1, size)
        scores = tile @ keys[:, :seen].transpose(1, 2)
        later = torch.ones(own, own, dtype=torch.bool).triu(1)
        scores.view(heads, -1, own, seen)[..., seen - own :].masked_fill_(later, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
        out[begin:end] = (weights @ values[:, :seen]).view(-1, own, size).transpose(0, 1)


# -- transformers ----------------------------------------------------------------------------------
def suits(model: Any) -> bool:
    """Whether this attention can be the model's: on the CPU, and without caps, sinks or biases."""
    return model.device.type == "cpu" and model.config.model_type in _PLAIN


def switch(model: Any) -> None:
    """Make the model call `paged_attention`; before its loop is made."""
    AttentionInterface.register(NAME, paged_attention)
    # Not `set_attn_implementation`: the name would send it looking for a package.
    model.config._attn_implementation = NAME


def switch_back(model: Any) -> None:
    """Undo `switch`."""
    model.config._attn_implementation = "sdpa"


def install(processor: Any) -> list[str]:
    """Let every step of a batch processor carry its plan.

    Returns what transformers or the model lacks for it; then nothing was changed.
    """
    if lacking := _lacking(processor):
        return lacking
    cache, inputs = processor.cache, processor.inputs_and_outputs
    (allocator,) = cache.cache_allocators.values()
    views = allocator._kv_token_views
    layout = Layout(
        page_tokens=allocator.tokens_per_page,
        block_stride=allocator.block_physical_stride,
        kv_heads=allocator.num_key_value_heads,
    )
    prepare, arguments = inputs.prepare_batch_tensors, inputs.get_model_kwargs

    def prepare_with_plan(requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        # With nothing to read, transformers only writes the new keys to the cache.
        prepare(requests_in_batch, *args, **kwargs | {"max_kv_read": 0})
        pieces, start = [], 0
        for each in requests_in_batch:
            pieces.append(
                Piece(
                    start=start,
                    queries=each.query_length,
                    length=each.state.position_offset,
                    blocks=allocator.block_table[each.state.request_id],
                )
            )
            start += each.query_length
        inputs.plan = Plan(pieces, layout, views)

    def arguments_with_plan(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**arguments(*args, **kwargs), "plan": inputs.plan}

    inputs.prepare_batch_tensors = prepare_with_plan
    inputs.get_model_kwargs = arguments_with_plan
    return []


def _lacking(processor: Any) -> list[str]:
    """Inner names this module needs and transformers hasn't; layers that see a window only."""
    cache, inputs = processor.cache, processor.inputs_and_outputs
    allocators = list(getattr(cache, "cache_allocators", {}).values())
    if len(allocators) > 1 or any(each.layer_type != "full_attention" for each in allocators):
        return ["full attention in every layer"]
    wanted: list[tuple[Any, str]] = [(cache, "update"), (cache, "cache_allocators")]
    wanted += [(inputs, "prepare_batch_tensors"), (inputs, "get_model_kwargs")]
    names = ("_kv_token_views", "block_table", "block_physical_stride", "tokens_per_page")
    wanted += [(each, name) for each in allocators for name in (*names, "num_key_value_heads")]
    lacking = [f"{type(each).__name__}.{name}" for each, name in wanted if not hasattr(each, name)]
    # Older versions call `update` from inside their attention functions.
    signatures = (("update", cache, "kwargs"), ("prepare_batch_tensors", inputs, "max_kv_read"))
    for name, each, parameter in signatures:
        if (
            hasattr(each, name)
            and parameter not in inspect.signature(getattr(each, name)).parameters
        ):
            lacking.append(f"{type(each).__name__}.{name}({parameter})")
    return lacking
