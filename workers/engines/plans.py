"""What one step of the batching loop attends to, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

#: Key positions a bucket may waste on padding; about what the calls of one more bucket cost.
_PADDING = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one request computes in a step."""

    #: Its first row among the queries of the step, and how many it has.
    start: int
    queries: int
    #: Tokens of it in the cache, those of this step included.
    length: int
    blocks: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the cache keeps the keys of a token, as rows of one head each."""

    page_tokens: int
    block_stride: int
    kv_heads: int

    def rows(self, tables: Sequence[Sequence[int]], lengths: torch.Tensor) -> torch.Tensor:
        """Rows of [request, head, position]; past a request's length row 0, which is never used."""
        longest = int(lengths.max())
        pages = -(-longest // self.page_tokens)
        padded = [[*table[:pages], *([0] * (pages - len(table)))] for table in tables]
        first = torch.tensor(padded).unsqueeze(-1) * self.block_stride
        tokens = (first + torch.arange(self.page_tokens)).flatten(1)[:, :longest]
        tokens = tokens.masked_fill(torch.arange(longest) >= lengths.unsqueeze(-1), 0)
        return tokens.unsqueeze(1) * self.kv_heads + torch.arange(self.kv_heads).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Requests with one query each and about as many keys."""

    #: Their rows among the queries of the step.
    at: torch.Tensor
    #: Rows of the cache, [request * head * position].
    rows: torch.Tensor
    #: Longest of them.
    length: int
    #: True where a request has no key, [request, 1, position]; None when all are as long.
    absent: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A part of a prompt, and whatever of it is cached already."""

    start: int
    queries: int
    length: int
    #: Rows of the cache; None when all keys are those of this step.
    rows: torch.Tensor | None


class Plan:
    """What every layer of one step attends to."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        layout: Layout,
        views: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.pieces = pieces
        self.layout = layout
        #: Keys and values in the cache, by layer.
        self.views = views

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The requests that generate."""
        single = sorted((p for p in self.pieces if p.queries == 1), key=lambda p: -p.length)
        return [_bucket(group, self.layout) for group in _group(single)]

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [_prompt(piece, self.layout) for piece in self.pieces if piece.queries > 1]


def _group(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Split pieces, the longest first, where padding the next would waste more than a bucket."""
    groups: list[list[Piece]] = []
    waste = 0
    for piece in pieces:
        waste += groups[-1][0].length - piece.length if groups else 0
        if not groups or waste > _PADDING:
            groups.append([])
            waste = 0
        groups[-1].append(piece)
    return groups


def _bucket(pieces: Sequence[Piece], layout: Layout) -> Bucket:
    lengths = torch.tensor([piece.length for piece in pieces])
    longest = pieces[0].length
    absent = torch.arange(longest) >= lengths.unsqueeze(-1)
    return Bucket(
        at=torch.tensor([piece.start for piece in pieces]),
        rows=layout.rows([piece.blocks for piece in pieces], lengths).flatten(),
        length=longest,
        absent=absent.unsqueeze(1) if pieces[-1].length < longest else None,
    )


def _prompt(piece: Piece, layout: Layout) -> Prompt:
    rows = None
    if piece.length > piece.queries:
        rows = layout.rows([piece.blocks], torch.tensor([piece.length])).flatten()
    return Prompt(start=piece.start, queries=piece.queries, length=piece.length, rows=rows)
