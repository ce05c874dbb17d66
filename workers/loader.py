"""Loads checkpoints: GGUF into safetensors once, safetensors into a model on its device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from config.catalogue import ModelSpec

# Progress is reported by the caller; bars would tear the logs apart.
disable_progress_bar()

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


#: What a checkpoint is loaded as, by the model's kind.
_CLASSES: dict[str, Any] = {
    "chat": AutoModelForCausalLM,
    "embedding": AutoModel,
    "classifier": AutoModelForSequenceClassification,
    "reranker": AutoModelForSequenceClassification,
}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model as a safetensors checkpoint with its tokeniser and chat template."""
    source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        # The file holds a few bits a weight; float32 keeps all of what they say.
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
        # A model read from GGUF refuses to be saved; a fresh one with the same weights doesn't.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def limit_memory(mib: int) -> None:
    """Let this process take no more of its CUDA device; 0: no bound. Others share the device."""
    if mib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, mib * 1024**2 / total), 0)


def device() -> torch.device:
    """The device this process computes on: the first one it may see."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def dtype_for(spec: ModelSpec, where: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, else float32."""
    if spec.dtype != "auto":
        return _DTYPES[spec.dtype]
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX or Arm BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_model(
    spec: ModelSpec, folder: Path, *, dtype: torch.dtype, where: torch.device
) -> PreTrainedModel:
    """The model in evaluation mode; safetensors only, no code from the checkpoint.

    Raises `ValueError` for a classifier or reranker whose checkpoint lacks weights: transformers
    puts random ones in their place, and so would be the verdicts.
    """
    model: PreTrainedModel
    model, info = _CLASSES[spec.kind].from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    lacking = sorted(info["missing_keys"])
    if lacking and spec.kind in ("classifier", "reranker"):
        raise ValueError(f"{spec.name}: the checkpoint lacks {', '.join(lacking[:3])}")
    return model.to(where).eval()
