"""The compiled module: csrc/bindings.cpp."""

from typing import Any

import torch
from torch import Tensor

class StepPlan:
    """What a step needs to know about every parameter, built once and refreshed by comparing."""

    def __init__(self) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        inv_grad_scale: float = 1.0,
        all_for_torch: bool = False,
    ) -> list[tuple[int, int]] | None:
        """Update everything and return None; or write nothing and return the (group, index) that need torch's path.

        After those have been treated, call :meth:`run`, or :meth:`discard` on an error.
        """

    def step_scaled_on_device(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        all_for_torch: bool,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> Any:
        """As :meth:`step`, without waiting for GradScaler's numbers.

        found_inf and grad_scale are CUDA tensors that the kernels read. When anything but a CUDA kernel would have to
        know them, nothing is written and NotImplemented is returned: read them, and call again without them.
        """

    def run(self) -> None: ...
    def discard(self) -> None: ...
    def convert(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Bring momentum buffers into the formulation that their group names; raises where that is not exact."""

    def set_average_weight(self, weight: float) -> None:
        """Keep averages at ``state[p]["ema"]``, with this weight of the new parameter in the next step; 0: none."""

    rounding_step: int
    """How many steps there have been: random numbers depend on it."""

    def begin_torch_step(self) -> None:
        """What a prepared step does before torch's path: conversions, and averages that start with it."""

    def adopt_formulations(self, param_groups: list[dict[str, Any]]) -> None:
        """Take the buffers to be in the formulation that their group names now."""

    def unstarted_buffers(self) -> list[Tensor]:
        """CUDA buffers in the state whose tensor has yet to have its first step: it overflowed. Waits for the GPU."""

class GradNorm:
    """The norm of all gradients of an optimizer, and whether they are still the same ones later."""

    def __init__(self) -> None: ...
    def compute(self, param_groups: list[dict[str, Any]], norm_type: float) -> tuple[float, torch.dtype] | None:
        """The p-norm (1, 2 or inf) and the dtype that torch would return it in; None where it takes torch's path."""

    def compare(self, param_groups: list[dict[str, Any]]) -> str:
        """What has become of those gradients: ``"same"``, ``"replaced"`` (all of them) or ``"changed"``."""

HAS_CUDA_KERNELS: bool

def move_lookahead(
    params: list[Tensor], momentum_buffers: list[Tensor], lookaheads: list[Tensor], distances: list[float], back: bool
) -> None:
    """``params[i] += distances[i] * momentum_buffers[i]``, keeping in ``lookaheads[i]`` what was there; or the reverse.

    On the way back, elements that were not changed in between get the very bits that they had.
    """

def quantize(value: Tensor, dtype: torch.dtype, param: Tensor) -> tuple[Tensor, Tensor]:
    """`value` in int8 or float8_e4m3fn, laid out as `param` without gaps, and the fp32 scales of its blocks of 256."""

def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """The values in fp32, in the same layout."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """The instruction sets that this build has and this machine can run, best first."""

def set_isa(name: str) -> None:
    """Use one of :func:`isas`. Raises ValueError for any other name."""

def build_info() -> dict[str, str]:
    """Compiler, CUDA and threads of this build."""

def has_record_function_callbacks() -> bool:
    """True while a profiler or another observer of torch's operators is active."""
