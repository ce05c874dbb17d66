"""Small real checkpoints of sequence classifiers, made on the spot: random weights, safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from config.catalogue import ModelSpec

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LETTERS, *(f"##{each}" for each in _LETTERS)]
#: Longest input, marks included.
CONTEXT = 48


def _tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate(_VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_checkpoint(
    folder: Path, labels: tuple[str, ...], *, problem: str | None = None, seed: int = 0
) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        # Wide, so that different texts get scores that are apart.
        initializer_range=0.3,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type=problem,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def entry(folder: Path, kind: str, **fields: Any) -> ModelSpec:
    """The catalogue's entry for it."""
    given = {"name": f"tiny-{kind}", "kind": kind, "source": f"path:{folder}"}
    return ModelSpec.model_validate({**given, "context_tokens": 512, **fields})
