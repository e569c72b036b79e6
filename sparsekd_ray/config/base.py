"""What all settings share: frozen, no unknown keys, and the kinds of values that several of them take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
TeacherPolicy = Literal["dense", "dense+kd", "previous"]
Method = Literal["svd", "svd-whitened", "neurons", "sdm", "depth", "wanda", "magnitude"]
Allocation = Literal["uniform", "tiered", "energy", "optimal"]
ProtocolName = Literal["paper", "gptq", "words"]
Control = Literal["dense+kd", "ce-only", "kl-only"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
