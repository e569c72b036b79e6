"""The student as a module whose forward pass is its loss, and the DeepSpeed engine that trains it.

Shapes: B sequences, L tokens, N = B · (L − 1) predictions, D hidden size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sparsekd_ray.config import Distill, Execution
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.model import head
from sparsekd_ray.teacher.signal import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine(Protocol):
    """The part of a DeepSpeed engine that the loop uses."""

    device: torch.device
    optimizer: torch.optim.Optimizer
    global_steps: int

    def __call__(
        self, input_ids_BL: Tensor, labels_N: Tensor, target: Target, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None: ...

    def step(self) -> None: ...

    def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool) -> object: ...

    def load_checkpoint(self, load_dir: str, tag: str) -> object: ...

    def destroy(self) -> None: ...


class Student(nn.Module):
    """A causal language model whose forward pass is the distillation loss; it owns the head that the loss needs."""

    def __init__(self, model: PreTrainedModel, settings: Distill) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self, input_ids_BL: Tensor, labels_N: Tensor, target: Target, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss to differentiate, Σ KL and Σ CE; `positions` is the number of predictions of the whole step."""
        hidden_BLD = head.hidden_states(self.model, input_ids_BL)[:, :-1]
        return kd_loss(
            hidden_BLD.flatten(0, 1),
            head.weight(self.model),
            labels_N,
            target,
            temperature=self.settings.temperature,
            kl_weight=self.settings.alpha / positions,
            ce_weight=(1 - self.settings.alpha) / positions,
        )


def start_engine(student: Student, settings: Distill, execution: Execution, micro_steps: int) -> Engine:
    """A DeepSpeed engine over the workers of this process group; AdamW on the parameters that require a gradient."""
    os.environ["DS_ACCELERATOR"] = "cuda" if execution.gpus else "cpu"
    import deepspeed

    # on a CPU this op would be compiled for 90 seconds at the first start; gloo replaces it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    options = _options(settings, execution, micro_steps)
    engine: Engine = deepspeed.initialize(model=student, model_parameters=trained, config=options)[0]
    return engine


def _options(settings: Distill, execution: Execution, micro_steps: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": execution.zero_stage}
    if execution.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    optimizer = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": [0.9, 0.95]}
    return {
        "train_micro_batch_size_per_gpu": execution.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": execution.gpus},
        "optimizer": {"type": "AdamW", "params": optimizer | {"torch_adam": not execution.offload}},
        "steps_per_print": 10**9,
    }
