"""Baseline of `loadtests.embeddings`: tokeniser, model and mean alone, in batches of 32.

As its users write it: transformers' model and tokeniser, sorted by length as sentence-transformers
does, in the precision a worker would take. Reads one JSON line per run, `{"texts": […]}`, and
answers with one: `{"seconds": …}`. Usage: `python -m loadtests.baseline_embeddings FOLDER`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from config import catalogue
from loadtests.stack import EMBEDDINGS
from workers.pinning import unbind

BATCH = 32


def main() -> None:
    # Imports torch, which must come after `workers.pinning` has looked at the processors.
    import torch
    from transformers import AutoModel

    from workers.loader import device, dtype_for, load_tokenizer

    unbind()
    folder = Path(sys.argv[1])
    spec = catalogue.load()[EMBEDDINGS]
    where = device()
    tokenizer = load_tokenizer(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype_for(spec, where)).to(where).eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> int:
        ordered = sorted(texts, key=len, reverse=True)
        made = 0
        for start in range(0, len(ordered), BATCH):
            tokens = tokenizer(
                ordered[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
            ).to(where)
            hidden = model(**tokens).last_hidden_state
            weights = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
            vectors = torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
            made += len(vectors)
        return made

    print(json.dumps({"ready": True, "dtype": str(model.dtype)}), flush=True)
    for line in sys.stdin:
        texts = json.loads(line)["texts"]
        began = time.perf_counter()
        made = encode(texts)
        print(json.dumps({"seconds": time.perf_counter() - began, "made": made}), flush=True)


if __name__ == "__main__":
    main()
