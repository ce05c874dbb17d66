"""What the sections of the settings are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Frozen; an unknown name in it stops the start."""

    model_config = ConfigDict(frozen=True, extra="forbid")
