"""The compiled module: csrc/binding/module.cpp."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

class PreparedStep:
    """A step that was checked and has written nothing. Leaving it as a context discards it, unless it ran."""

    def fallback(self) -> list[tuple[int, int]]:
        """The (group, index in group) of tensors that torch is to update, between :meth:`begin` and :meth:`run`."""

    def is_on_devices(self, average_count: Tensor | None = None) -> bool:
        """True where CUDA kernels do all of it: then :meth:`run` takes numbers that only the device knows.

        With a count of the averages' updates on a device, that must be the only one.
        """

    def begin(self) -> None:
        """The first writes: new and converted state, and averages that start with it."""

    def run(
        self,
        grad_factor: float = 1.0,
        average_weight: float = 0.0,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        device_factor: Tensor | None = None,
        average: tuple[Tensor, Tensor] | None = None,
        ema_decay: float = 0.0,
        ema_warmup: bool = False,
    ) -> None:
        """Update.

        grad_factor multiplies the gradients; average_weight is that of the parameters in their averages. The tensors
        are numbers on a CUDA device that nobody waits for: found_inf and grad_scale are a GradScaler's; device_factor
        (float64, in place of grad_scale) multiplies the gradients too; average (float64) holds the averages' weight
        and the count of their updates: the step counts itself there.
        """

    def __enter__(self) -> PreparedStep: ...
    def __exit__(self, *error: object) -> None: ...

class Plan:
    """What a step needs to know about every parameter, built once and brought up to date by comparing."""

    def __init__(self, rule: str, name: str) -> None: ...
    def step(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], all_by_torch: bool = False
    ) -> PreparedStep | None:
        """Update everything; where torch has a part in it, return the step that is prepared."""

    def prepare(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        all_by_torch: bool = False,
        averaging: bool | None = None,
        grads: dict[Tensor, Tensor] | None = None,
        may_be_left_out: bool = False,
    ) -> PreparedStep:
        """A step with averages at ``state[p]["ema"]`` (False: only make those that are missing).

        grads stand in for gradients of these parameters; may_be_left_out: by the device, for an overflow.
        """

    def pending_changes(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], moved_only: bool = False
    ) -> tuple[list[tuple[Tensor, str, Tensor | None]], list[int]]:
        """What the next step makes of the state before it updates: (parameter, key, tensor; None: the key goes).

        And the groups whose buffers are then in their group's formulation. With moved_only: only the buffers of
        parameters from another group, in the formulation that their group's "buffer_formulation" says. Raises where
        there is no exact conversion; changes nothing.
        """

    def adopt(self, param_groups: list[dict[str, Any]]) -> None:
        """Take all buffers to be in the formulation that their groups' "buffer_formulation" says."""

    def has_moved(self, param_groups: list[dict[str, Any]]) -> bool:
        """True where a parameter comes from another group and its buffer is not in the formulation that this says."""

    redistributing_meshes: set[Any]
    """Meshes on which a gradient has lain otherwise than its parameter: their ranks agree in each step."""

    rounding_step: int
    """How many steps there have been: random numbers depend on it. Set before the first; reading waits for the GPU."""

    def count_updates(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
        momentum_buffers: list[Tensor | None],
        scales: list[Tensor | None],
        masters: list[Tensor | None],
    ) -> Tensor:
        """For each parameter the last step's updates, those below the storage's resolution, those lost in arithmetic.

        int64 [params, 3], -1 where nothing is counted: the kernels are not made for it, or it lacks a tensor that the
        update depends on.
        """

    def unstarted_buffers(self) -> list[Tensor]:
        """CUDA buffers in the state whose tensor has yet to have its first step: it overflowed. Waits for the GPU."""

class GradNorm:
    """The norm of all gradients of an optimizer, and whether they are still the same ones later."""

    def __init__(self) -> None: ...
    def compute(
        self,
        param_groups: list[dict[str, Any]],
        norm_type: float,
        remembers: bool = False,
        grads: dict[Tensor, Tensor] | None = None,
        process_group: Any = None,
    ) -> tuple[float | None, torch.dtype] | None:
        """The p-norm (1, 2 or inf) and the dtype that torch would return it in; None where it takes torch's path.

        Of CUDA gradients the norm is None: :meth:`conclude` has it computed on their device. With DTensors, and with a
        process group, all ranks call it and get the same: which collectives run depends on the parameters alone.
        """

    def tell_error(self, param_groups: list[dict[str, Any]], process_group: Any) -> None:
        """In place of :meth:`compute` on a rank that has found an error before: then it raises on the others."""

    has_ranks: bool  # whether other ranks took part in the last compute()

    def conclude(
        self, factor: Tensor | None, inv_scale: Tensor | None, grad_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """On the device of the gradients that :meth:`compute` saw, and without waiting for it.

        What the next step multiplies gradients with: factor * inv_scale / grad_scale, times the coefficient of
        max_norm; it lives until the next call but one. Then with max_norm the norm of the gradients times these
        factors, else 1.0 where their own norm is not finite, and 0.0 where it is.
        """

    def compute_of(self, grads: list[Tensor], norm_type: float) -> tuple[float | None, torch.dtype] | None:
        """The same for a list of gradients."""

    num_grads: int
    has_float16: bool
    device: int
    """Of the gradients that were read last; the device is an index, or -1 for the CPU."""

    def remember(self, param_groups: list[dict[str, Any]], indices: list[int] | None = None, shift: int = 0) -> int:
        """Remember the gradients that are there now, each with the index of its coefficient (without indices 0).

        Absent ones that were remembered before keep theirs, moved up by `shift` (0: they are forgotten); returns how
        many they are.
        """

    def forget(self, param_groups: list[dict[str, Any]]) -> int:
        """Forget the gradients that are there now; returns how many others are remembered."""

    def match(self, param_groups: list[dict[str, Any]]) -> list[tuple[int, int, int]] | None:
        """None when the gradients are those that were remembered, untouched, with coefficient 0.

        Else for each gradient (group, index in group, coefficient); -1: its memory was not remembered, -2 - index: it
        was written since.
        """

class ListStep:
    """A step over lists of tensors, for a compiled graph. Made, it has checked everything and written nothing."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        averages: list[Tensor | None],
        is_first_step: list[bool],
        inv_grad_scale: float,
        average_weight: float,
    ) -> None: ...
    def fallback(self) -> list[tuple[int, int]]:
        """The (group, index in group) that torch is to update before :meth:`run` updates the rest."""

    def run(self) -> None: ...

HAS_CUDA_KERNELS: bool

def move_lookahead(
    params: list[Tensor], momentum_buffers: list[Tensor], lookaheads: list[Tensor], distances: list[float], back: bool
) -> None:
    """``params[i] += distances[i] * momentum_buffers[i]``, keeping in ``lookaheads[i]`` what was there; or the reverse.

    On the way back, elements that were not changed in between get the very bits that they had.
    """

def clip_by_norm(norm: float, dtype: torch.dtype, max_norm: float) -> tuple[Tensor, float]:
    """The norm as torch.nn.utils.clip_grad_norm_ returns it, and the coefficient that clips, with torch's roundings."""

def quantize(value: Tensor, dtype: torch.dtype, param: Tensor, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """`value` in int8, float8_e4m3fn or uint8 (int4), laid out as `param` without gaps, and the bytes of its scales.

    `non_negative`: of a state that never is negative; then uint8 has its roots, one in each byte.
    """

def dequantize(quantized: Tensor, scale: Tensor, sizes: Sequence[int], non_negative: bool = False) -> Tensor:
    """The values in fp32, of the parameter's sizes, in the same layout."""

def can_pack(param: Tensor) -> bool:
    """Whether momentum of 4 bits can be stored beside this parameter; else it is stored in 8."""

def is_packed_of(packed: Tensor, sizes: Sequence[int]) -> bool:
    """Whether codes of 4 bits, two in a byte, are those of a tensor of these sizes."""

def inverse_scale(scale: float) -> float:
    """1 / scale, rounded to fp32 as GradScaler.unscale_ rounds it."""

def check_memory(tensor: Tensor, name: str) -> None:
    """Raises RuntimeError, with the name, where a strided tensor's storage was freed or is too small for it."""

def set_elements_per_thread(count: int) -> None:
    """A parallel region has at least so many elements for each of its threads (default: 262,144)."""

def is_capturing(device: int) -> bool:
    """True while a CUDA graph is being captured on the device's current stream."""

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
