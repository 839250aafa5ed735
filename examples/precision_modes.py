"""The modes of low-precision states that the examples compare, and what a parameter in each of them stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from precision_flash import FlashFormats
from torch import Tensor

from momentum_ext import FusedMomentum

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, "int4"


@dataclass(frozen=True)
class Mode:
    """A dtype of parameters and gradients, and FusedMomentum's options; None: torch.optim.SGD's for-loop."""

    name: str
    param: torch.dtype
    options: Mapping[str, Any] | None = field(default_factory=dict)

    def optimizer(self, params: Any, **hyper: Any) -> torch.optim.Optimizer:
        """An optimizer in this mode."""
        if self is FLASH:
            return FlashFormats(params, **hyper)
        if self.options is None:
            return torch.optim.SGD(params, **hyper, foreach=False)
        return FusedMomentum(params, **hyper, **self.options)

    @property
    def bytes(self) -> float:
        """Of parameter, gradient and state, for each element."""
        if self is FLASH:
            return 2 + 2 + 1 + 1 + 2 / 32
        if self.options is None:
            return 3 * self.param.itemsize
        param = torch.nn.Parameter(torch.zeros(1024, dtype=self.param))
        optimizer = FusedMomentum([param], momentum=0.9, **self.options)
        return optimizer.memory_summary().total / param.numel()


SR: dict[str, Any] = {"stochastic_rounding": True}
MASTER: dict[str, Any] = {"master_weights": True}
MASTER_24: dict[str, Any] = {"master_weights": 24}

MODES: tuple[Mode, ...] = (
    Mode("fp32, torch", FP32, None),
    Mode("fp32", FP32),
    Mode("fp32, bf16 momentum", FP32, {"momentum_dtype": BF16}),
    Mode("fp32, bf16 momentum SR", FP32, {"momentum_dtype": BF16, **SR}),
    Mode("fp32, fp16 momentum", FP32, {"momentum_dtype": FP16}),
    Mode("fp32, int8 momentum", FP32, {"momentum_dtype": INT8}),
    Mode("fp32, int8 momentum SR", FP32, {"momentum_dtype": INT8, **SR}),
    Mode("fp32, fp8 momentum", FP32, {"momentum_dtype": FP8}),
    Mode("fp32, fp8 momentum SR", FP32, {"momentum_dtype": FP8, **SR}),
    Mode("fp32, int4 momentum SR", FP32, {"momentum_dtype": INT4, **SR}),
    Mode("bf16, torch", BF16, None),
    Mode("bf16", BF16),
    Mode("bf16, fp32 momentum", BF16, {"momentum_dtype": FP32}),
    Mode("bf16 SR", BF16, SR),
    Mode("bf16 SR, int8 momentum", BF16, {"momentum_dtype": INT8, **SR}),
    Mode("bf16 split, fp32 momentum", BF16, {"momentum_dtype": FP32, **MASTER}),
    Mode("bf16 split", BF16, {"momentum_dtype": BF16, **MASTER}),
    Mode("bf16 split, bf16 momentum SR", BF16, {"momentum_dtype": BF16, **MASTER, **SR}),
    Mode("bf16 split, int8 momentum SR", BF16, {"momentum_dtype": INT8, **MASTER, **SR}),
    Mode("bf16 24 bits, fp32 momentum", BF16, {"momentum_dtype": FP32, **MASTER_24}),
    Mode("bf16 24 bits, int8 momentum", BF16, {"momentum_dtype": INT8, **MASTER_24}),
    Mode("bf16 24 bits, int4 momentum SR", BF16, {"momentum_dtype": INT4, **MASTER_24, **SR}),
    Mode("fp16, torch", FP16, None),
    Mode("fp16", FP16),
    Mode("fp16 SR", FP16, SR),
    Mode("fp16 master", FP16, {"momentum_dtype": FP16, **MASTER}),
)
FLASH = Mode("FlashOptim's formats", BF16)
"""SR: stochastic rounding. split, 24 bits, master: master_weights. Momentum without a name: the parameters' dtype."""


def truth(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor:
    """The values that are trained: in fp32, from the master where there is one."""
    if isinstance(optimizer, FlashFormats):
        return optimizer.exact(param)
    if not isinstance(optimizer, FusedMomentum):
        return param.detach().float()
    found: Tensor = optimizer.fp32_state_dict(torch.nn.ParameterList([param]))["0"]
    return found
