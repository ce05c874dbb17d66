"""How answers are written where plain text isn't enough: several to one job, or with logprobs.

The text of such a job in the queue, its deltas and its snapshots, is a line of JSON for each piece,
`[answer, text, logprobs]`. Workers write it, the API reads it; the queue knows nothing of it. Which
jobs have it, their body says.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

#: A token as the chat endpoint shows it: `{token, bytes, logprob, top_logprobs: [...]}`.
TokenLogprob = dict[str, Any]


def in_pieces(body: Mapping[str, Any]) -> bool:
    """Whether the text of a job with this body is a line for each piece."""
    return (body.get("n") or 1) > 1 or wants_logprobs(body)


def wants_logprobs(body: Mapping[str, Any]) -> bool:
    wanted = body.get("logprobs")
    # Completions say a number, and 0 is one.
    return wanted is not None and wanted is not False


def piece(answer: int, text: str, logprobs: list[TokenLogprob]) -> str:
    """One piece of the answer with that number."""
    return orjson.dumps([answer, text, logprobs]).decode() + "\n"


def pieces(text: str) -> Iterator[tuple[int, str, list[TokenLogprob]]]:
    """What was written by `piece`."""
    for line in text.split("\n")[:-1]:
        answer, said, logprobs = orjson.loads(line)
        yield answer, said, logprobs


def chat_logprobs(entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
    """As a choice of a chat shows them."""
    return None if entries is None else {"content": entries, "refusal": None}


def completion_logprobs(
    entries: list[TokenLogprob] | None, offset: int = 0
) -> dict[str, Any] | None:
    """As a choice of a completion shows them; `offset` is where the first token begins."""
    if entries is None:
        return None
    # A character may be spread over several tokens.
    decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), []
    for entry in entries:
        offsets.append(offset)
        offset += len(decoder.decode(bytes(entry["bytes"])))
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets,
    }
