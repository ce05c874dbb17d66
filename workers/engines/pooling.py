"""How a sentence vector is made of token vectors, read from a sentence-transformers checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """Mean or first-token pooling, and whether vectors get length 1."""

    first_token: bool = False
    normalise: bool = True
    #: Longest input the checkpoint was made for, marks included.
    max_tokens: int = 2**31

    @classmethod
    def of(cls, folder: Path) -> Pooling:
        """The checkpoint's own pooling; mean and normalised where it says nothing.

        Raises `ValueError` for a pooling that isn't supported.
        """
        pooling = _read(folder / "1_Pooling" / "config.json", {})
        modes = {
            name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True
        } or {"pooling_mode_mean_tokens"}
        if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
            raise ValueError(f"{folder.name}: pooling {', '.join(sorted(modes))} isn't supported")
        modules = _read(folder / "modules.json", [])
        limit = _read(folder / "sentence_bert_config.json", {}).get("max_seq_length")
        return cls(
            first_token=modes == {"pooling_mode_cls_token"},
            normalise=not modules or any("Normalize" in module["type"] for module in modules),
            max_tokens=limit or 2**31,
        )

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, size] and [batch, tokens] into [batch, size]."""
        if self.first_token:
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else default
