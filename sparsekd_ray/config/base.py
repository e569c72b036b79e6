"""The base class of all settings (frozen, without unknown keys), and types of values that several settings share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from sparsekd_ray.prune.methods import METHODS

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
TeacherPolicy = Literal["dense", "dense+kd", "previous"]
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]  # the name of every `MethodSpec`
Allocation = Literal["uniform", "tiered", "energy", "optimal"]
ProtocolName = Literal["paper", "gptq", "words"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)
TrackerName = Literal["trackio", "tensorboard", "mlflow", "wandb"]
Control = Literal["dense+kd", "ce-only", "kl-only"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
