"""What an encoder is used for: vectors of texts, labels of texts, or how well documents fit.

A head makes inputs of a request, has them computed in batches, and makes the result of the rows
of numbers that come out. All that is the same for the three is in `workers.engines.encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broker.jobs import Usage
from config.catalogue import ModelSpec
from workers.admission import Limits
from workers.engine import EngineError, EngineResult, Judgement
from workers.engines.bucketing import Inputs, Piece, WaitingInputs
from workers.engines.networks import Network, Rows, last_in_float32
from workers.engines.pooling import Pooling
from workers.engines.precision import Tolerance, cosine_distance, largest_difference, settle
from workers.engines.texts import TextEncoder
from workers.loader import dtype_for, load_config, load_model, load_tokenizer
from workers.prompts import PromptBuilder

_SAMPLES = (
    "The forebay is the pool where water waits before it enters the turbines.",
    "Ein kurzer Satz.",
    "How do I reset my password when I no longer have access to the e-mail address I used?",
    "SELECT id FROM jobs WHERE status = 'queued' ORDER BY created_ms LIMIT 10;",
)


class Head:
    """What the three have in common. `start` first; then thread-safe."""

    tolerance: Tolerance

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder

    def start(self, device: torch.device) -> None:
        """Load the model in a precision that it bears."""
        self._device = device
        config = load_config(self.folder)
        self._understand(config)
        tokenizer = load_tokenizer(self.folder)
        self.texts = TextEncoder(PromptBuilder(tokenizer), self.limits)
        self._input_names = frozenset(tokenizer.model_input_names)
        self._network = settle(
            self._load,
            dtype_for(self.spec, device),
            self._compute,
            self.batch(self.warm_up),
            self.tolerance,
            insist=self.spec.dtype != "auto",
        )

    @property
    def warm_up(self) -> dict[str, Any]:
        """The body of a request."""
        return {"input": list(_SAMPLES), "truncate": True}

    def inputs(self, body: Mapping[str, Any]) -> Inputs:
        """Raises `EngineError` for what the model can't take."""
        raise NotImplementedError

    def result(self, body: Mapping[str, Any], rows: Sequence[Rows], usage: Usage) -> EngineResult:
        """`rows` in the order of the inputs."""
        raise NotImplementedError

    def batch(self, body: Mapping[str, Any]) -> list[Piece]:
        """All inputs of a request as one batch."""
        owner = WaitingInputs("", self.inputs(body), body)
        return [Piece(owner, index) for index in range(len(owner.inputs.tokens))]

    def compute(self, pieces: Sequence[Piece]) -> Rows:
        """A row of numbers for each input."""
        return self._compute(self._network, pieces)

    @property
    def context_tokens(self) -> int:
        """Longest input, marks included."""
        return self.limits.context_tokens

    # -- for the heads -----------------------------------------------------------------------------
    def _understand(self, config: Any, *, most_tokens: int = 2**31) -> None:
        """Take what is to be known from the checkpoint's configuration."""
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            # Their positions count from behind the padding's own.
            positions -= config.pad_token_id + 1
        self.limits = Limits(
            context_tokens=min(self.spec.context_tokens, most_tokens, positions),
            output_tokens=1,
            vocabulary=config.vocab_size,
        )

    def _load(self, dtype: torch.dtype) -> Network:
        model: Any = load_model(self.spec, self.folder, dtype=dtype, where=self._device)
        return Network(model, self._device, self._input_names)

    def _finish(self, network: Network, out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def _compute(self, network: Network, pieces: Sequence[Piece]) -> Rows:
        out, mask = network(pieces)
        rows: Rows = self._finish(network, out, mask).float().cpu().numpy()
        return rows


class Embedding(Head):
    """A vector for each text."""

    # Cosines of 0.999 to float32, and 0.9999 between alone and in company.
    tolerance = Tolerance(distance=cosine_distance, precision=1e-3, company=1e-4)

    def _understand(self, config: Any, *, most_tokens: int = 2**31) -> None:
        self._pooling = Pooling.of(self.folder)
        super()._understand(config, most_tokens=min(most_tokens, self._pooling.max_tokens))

    def inputs(self, body: Mapping[str, Any]) -> Inputs:
        return _one_each(self.texts, body)

    def result(self, body: Mapping[str, Any], rows: Sequence[Rows], usage: Usage) -> EngineResult:
        size = body.get("dimensions")
        if size is not None:
            # The API has checked it against the catalogue; the catalogue may be wrong.
            if size > len(rows[0]):
                raise EngineError(
                    "invalid_request", f"the model gives {len(rows[0])} dimensions", "dimensions"
                )
            rows = [self._shortened(row, size) for row in rows]
        # Nine decimals are finer than float32 here, and half as long in JSON as a float64.
        vectors = [np.round(row.astype(np.float64), 9).tolist() for row in rows]
        return EngineResult(vectors=vectors, usage=usage)

    def _shortened(self, row: Rows, size: int) -> Rows:
        short = row[:size]
        return (
            short / max(float(np.linalg.norm(short)), 1e-12) if self._pooling.normalise else short
        )

    def _finish(self, network: Network, out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._pooling(out.float(), mask)


class _Scoring(Head):
    """Heads on a sequence classifier, whose numbers lie between 0 and 1."""

    tolerance = Tolerance(distance=largest_difference, precision=0.02, company=0.01)

    def _load(self, dtype: torch.dtype) -> Network:
        network = super()._load(dtype)
        last_in_float32(network.model)
        return network


class Classification(_Scoring):
    """Scores of the model's labels for each text, and which of them reach their threshold."""

    def inputs(self, body: Mapping[str, Any]) -> Inputs:
        return _one_each(self.texts, body)

    def result(self, body: Mapping[str, Any], rows: Sequence[Rows], usage: Usage) -> EngineResult:
        judgements = []
        for row in rows:
            scores = {
                label: round(float(score), 9)
                for label, score in zip(self._labels, row, strict=True)
                if label not in self.spec.harmless
            }
            flags = {
                label: score >= self.spec.threshold_of(label) for label, score in scores.items()
            }
            judgements.append(Judgement(scores=scores, flags=flags))
        return EngineResult(judgements=judgements, usage=usage)

    def _understand(self, config: Any, *, most_tokens: int = 2**31) -> None:
        super()._understand(config, most_tokens=most_tokens)
        self._labels = [str(config.id2label[index]) for index in range(config.num_labels)]
        unknown = {*self.spec.harmless, *self.spec.thresholds} - set(self._labels)
        if unknown or set(self._labels) <= set(self.spec.harmless):
            raise ValueError(
                f"{self.spec.name}: harmless and thresholds must name some of the model's labels,"
                f" which are {', '.join(self._labels)}"
            )
        self._independent = (
            config.num_labels == 1 or config.problem_type == "multi_label_classification"
        )

    def _finish(self, network: Network, out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = out.float()
        return torch.sigmoid(logits) if self._independent else torch.softmax(logits, dim=-1)


class Reranking(_Scoring):
    """How well each document answers the query, by a cross-encoder that reads both together."""

    @property
    def warm_up(self) -> dict[str, Any]:
        return {"query": _SAMPLES[1], "documents": list(_SAMPLES), "truncate": True}

    def inputs(self, body: Mapping[str, Any]) -> Inputs:
        cut = bool(body.get("truncate"))
        query = self.texts.query(body["query"], param="query")
        pairs = [
            self.texts.pair(
                query,
                self.texts.plain(document),
                param="documents",
                place=f"document {index}",
                cut=cut,
            )
            for index, document in enumerate(body["documents"])
        ]
        return Inputs([tokens for tokens, _ in pairs], [second for _, second in pairs])

    def result(self, body: Mapping[str, Any], rows: Sequence[Rows], usage: Usage) -> EngineResult:
        return EngineResult(relevance=[round(float(row[0]), 9) for row in rows], usage=usage)

    def _understand(self, config: Any, *, most_tokens: int = 2**31) -> None:
        super()._understand(config, most_tokens=most_tokens)
        if config.num_labels != 1:
            raise ValueError(
                f"{self.spec.name}: a reranker has one output, this model has {config.num_labels}"
            )

    def _finish(self, network: Network, out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(out.float())


_HEADS: dict[str, type[Head]] = {
    "embedding": Embedding,
    "classifier": Classification,
    "reranker": Reranking,
}


def head_for(spec: ModelSpec, folder: Path) -> Head:
    """Raises `KeyError` for a kind that no encoder serves."""
    return _HEADS[spec.kind](spec, folder)


def _one_each(texts: TextEncoder, body: Mapping[str, Any]) -> Inputs:
    cut = bool(body.get("truncate"))
    return Inputs(
        [
            texts.one(item, param="input", place=f"input {index}", cut=cut)
            for index, item in enumerate(body["input"])
        ]
    )
