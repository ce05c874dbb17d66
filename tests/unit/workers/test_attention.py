"""Attention over a paged cache against the formula, request by request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.engines.attention import paged_attention
from workers.engines.plans import Layout, Piece, Plan

SIZE = 8
PAGE = 4


class Cache:
    """One layer's pages, keys and values in turn as transformers lays them out."""

    def __init__(self, kv_heads: int, pages: int) -> None:
        rows = torch.randn(pages, 2, PAGE, kv_heads, SIZE)
        # Stale numbers, which nobody may read; page 0 is nobody's.
        rows[1:] = torch.nan
        rows[0] = 0
        flat = rows.view(-1, kv_heads, SIZE)
        self.keys, self.values = flat, flat[PAGE:]
        self.layout = Layout(page_tokens=PAGE, block_stride=2 * PAGE, kv_heads=kv_heads)
        self._free = torch.randperm(pages - 1).add(1).tolist()

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> list[int]:
        """Store [position, head, size] of a request; its blocks."""
        blocks = [self._free.pop() for _ in range(-(-len(keys) // PAGE))]
        for at in range(len(keys)):
            row = blocks[at // PAGE] * 2 * PAGE + at % PAGE
            self.keys[row], self.values[row] = keys[at], values[at]
        return blocks


def _expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last positions, [position, head, size]."""
    shared = query.size(1) // keys.size(1)
    keys, values = (each.repeat_interleave(shared, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * SIZE**-0.5
    seen = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    "requests",
    [
        pytest.param([(1, 1)], id="first token alone"),
        pytest.param([(1, 9), (1, 9)], id="as long"),
        pytest.param([(1, 5), (1, 2000), (1, 8), (1, 1030)], id="several buckets"),
        pytest.param([(7, 7), (140, 140)], id="prompts"),
        pytest.param([(5, 12), (300, 513)], id="later parts of prompts"),
        pytest.param([(1, 30), (6, 6), (1, 17), (130, 150), (1, 1)], id="all at once"),
    ],
)
def test_each_request_attends_to_its_own_keys(
    heads: int, kv_heads: int, requests: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    cache = Cache(kv_heads, pages=2 + sum(-(-length // PAGE) for _, length in requests))
    pieces, queries, new, expected = [], [], [], []
    for count, length in requests:
        query = torch.randn(count, heads, SIZE)
        keys, values = torch.randn(2, length, kv_heads, SIZE)
        start = sum(map(len, queries))
        blocks = cache.put(keys, values)
        pieces.append(Piece(start=start, queries=count, length=length, blocks=blocks))
        queries.append(query)
        new.append((keys[-count:], values[-count:]))
        expected.append(_expected(query, keys, values))
    query, key, value = (
        torch.cat(parts).transpose(0, 1).unsqueeze(0)
        for parts in (queries, [k for k, _ in new], [v for _, v in new])
    )
    plan = Plan(pieces, cache.layout, {5: (cache.keys, cache.values)})
    module = SimpleNamespace(layer_idx=5)
    out, _ = paged_attention(module, query, key, value, None, plan=plan)
    torch.testing.assert_close(out[0], torch.cat(expected))


def test_padding_of_a_bucket_is_bounded() -> None:
    layout = Layout(page_tokens=PAGE, block_stride=2 * PAGE, kv_heads=1)
    lengths = [8, 16, 300, 1000, 1500, 4000]
    pieces = [
        Piece(start=at, queries=1, length=length, blocks=range(1, 1001))
        for at, length in enumerate(lengths)
    ]
    buckets = Plan(pieces, layout, {}).buckets
    assert sorted(at for bucket in buckets for at in bucket.at.tolist()) == list(range(6))
    for bucket in buckets:
        own = [lengths[at] for at in bucket.at.tolist()]
        assert bucket.length == max(own)
        assert sum(bucket.length - length for length in own) <= 1024
    assert len(buckets) == 3


def test_keys_that_were_not_cached_are_noticed() -> None:
    states = torch.zeros(1, 1, 1, SIZE)
    plan = Plan([], Layout(page_tokens=PAGE, block_stride=PAGE, kv_heads=1), {})
    with pytest.raises(RuntimeError, match="cache"):
        paged_attention(
            torch.nn.Module(), states, states, states, None, plan=plan, cu_seq_lens_k={}
        )
