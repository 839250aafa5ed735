"""Clipping and unscaling that ride in the next step: the gradients are read, never written."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C

__all__ = ["GradFactor", "StandIns", "clip_by_norm"]

# The gradients in the place of those of these parameters.
StandIns = dict[Tensor, Tensor]


@dataclass
class _Coefficient:
    """What gradients are multiplied with in the next step, as if it had been written into them."""

    factor: float | Tensor
    norm: float | Tensor | None  # of the gradients that it was computed from
    unscales: bool  # 1 / scale of a GradScaler is in it
    was_left_out: bool = False  # by a GradScaler, which has gone on without the step

    def lapses_when_written(self) -> bool:
        """False where new values would be multiplied with what was computed from others.

        After an overflow they would not: then training goes on with new gradients in the same memory. Only this
        question reads the norm of CUDA gradients.
        """
        if self.was_left_out:
            return True
        if self.unscales:
            return False
        return _is_one(self.factor) or (self.norm is not None and not math.isfinite(float(self.norm)))


class GradFactor:
    """What the next step multiplies the gradients with, and which gradients that was worked out for.

    A coefficient belongs to the memory of the gradients that it was computed from, as if they had been clipped in
    place: a view of the same storage is clipped, a gradient in other memory is not. Gradients that were written to
    since are an error, unless what waits is known to be 1 or came from an overflow. What ends a coefficient is
    ``zero_grad()``, the step that uses it, and a step that a GradScaler leaves out.

    For CUDA gradients it is a tensor on their device, which the host does not read. It lives in one of two places that
    take turns: a captured graph finds it where it was, and the one before is there as long as a step may yet fail.
    """

    def __init__(self) -> None:
        self.is_active = False  # an attribute, because each step asks
        self.traced: Tensor | None = None  # the factor of a compiled function, where nobody has read its value
        self._norms = _C.GradNorm()
        self._coefficients: list[_Coefficient] = []
        self._is_same = False  # current() has found the gradients that were remembered
        # norm_type, norm of the gradients as they are (None: the device knows), dtype, process group
        self._known: tuple[float, float | None, torch.dtype, Any] | None = None

    def _current_on_ranks(
        self, param_groups: list[dict[str, Any]], group: Any
    ) -> tuple[float | Tensor, StandIns | None]:
        """:meth:`current` before a norm that other ranks compute, too: they must not wait for one that raises."""
        try:
            return self.current(param_groups)
        except RuntimeError:
            self._norms.tell_error(param_groups, group)
            raise

    def current(self, param_groups: list[dict[str, Any]]) -> tuple[float | Tensor, StandIns | None]:
        """The factor for the gradients that are there now; where they have different ones 1, and stand-ins.

        Raises:
            RuntimeError: for a gradient that was written to since, with its place in `param_groups`.
        """
        self._is_same = False
        if self.traced is not None:
            return float(self.traced), None
        if not self._coefficients:
            return 1.0, None
        found = self._norms.match(param_groups)
        self._is_same = found is None
        if found is None:
            return self._coefficients[0].factor, None
        factors = {param_groups[g]["params"][i]: self._factor_of(code, g, i) for g, i, code in found}
        if len({id(factor) if isinstance(factor, Tensor) else factor for factor in factors.values()}) <= 1:
            return next(iter(factors.values()), 1.0), None
        _check_memory(param_groups)
        for each in self._coefficients:  # what is computed next takes a place that one of them may have
            each.factor = each.factor.clone() if isinstance(each.factor, Tensor) else each.factor
        return 1.0, {param: _multiplied(param.grad, factor) for param, factor in factors.items() if not _is_one(factor)}

    def _factor_of(self, code: int, g: int, i: int) -> float | Tensor:
        if code >= 0:
            return self._coefficients[code].factor
        name = f"gradient of param_groups[{g}]['params'][{i}]"
        if code == -1:
            if any(each.unscales and not each.was_left_out for each in self._coefficients):
                raise RuntimeError(
                    f"{name}: it was replaced after unscale_(), which takes effect in step(), so it may still be "
                    "scaled; replace it before unscale_(), or call optimizer.zero_grad() to start again"
                )
            return 1.0
        coefficient = self._coefficients[-2 - code]
        if coefficient.lapses_when_written():
            return 1.0
        before = "unscale_()" if coefficient.unscales else "clip_grad_norm_()"
        raise RuntimeError(
            f"{name}: it was written to after {before}, which takes effect in step(); clip last, after the last "
            "backward, call optimizer.zero_grad() to start again, or use max_grad_norm, which clips in the step"
        )

    def end_step(self, param_groups: list[dict[str, Any]]) -> None:
        """After a step that has used what waited for its gradients; absent ones keep theirs."""
        if self._is_same or not self._coefficients or not self._norms.forget(param_groups):
            self.clear()
        self.outlive_scaler()

    def clear(self) -> None:
        """Nothing waits any more."""
        self.traced = None
        self._coefficients = []
        self._known = None
        self.is_active = False

    def outlive_scaler(self) -> None:
        """After a step, or GradScaler.update() without one: what still waits belongs to these very values."""
        for coefficient in self._coefficients:
            coefficient.was_left_out = True

    def unscale(
        self, param_groups: list[dict[str, Any]], inv_scale: Tensor, only_checks: bool, group: Any
    ) -> Tensor | None:
        """Have the next step multiply with `inv_scale`, which is 1 where it only checks.

        Returns torch.amp.GradScaler's found_inf, on the gradients' device; None: torch must do it.

        Raises:
            ValueError: for fp16 gradients that are to be unscaled, as in torch.
        """
        factor, grads = self._current_on_ranks(param_groups, group)
        computed = self._norms.compute(param_groups, 2.0, not self._coefficients, process_group=group)
        if computed is None:
            _refuse(group)
            return None
        if not only_checks and self._norms.has_float16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        norm, dtype = computed
        new: float | Tensor
        if norm is None:
            scale = None if only_checks else inv_scale
            new, found_inf = self._norms.conclude(self._on_device(factor), scale, None, None)
        else:
            found_inf = torch.full((), 0.0 if math.isfinite(norm) else 1.0, dtype=torch.float32, device="cpu")
            new = float(factor) * float(inv_scale)
        unscales = not only_checks and (norm is None or float(inv_scale) != 1.0)
        self._remember(param_groups, grads, factor if only_checks else new, None, unscales)
        self._known = (2.0, norm, dtype, group)
        return found_inf

    @property
    def has_grads(self) -> bool:
        """Whether :meth:`unscale` has found any, or other ranks may have."""
        return self._norms.num_grads != 0 or self._norms.has_ranks

    def clip(
        self,
        param_groups: list[dict[str, Any]],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        group: Any,
    ) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, for the gradients times their factors, which take the coefficient."""
        factor, grads = self._current_on_ranks(param_groups, group)
        computed = self._norm_of(param_groups, grads, norm_type, group, remembers=not self._coefficients)
        if computed is None:
            _refuse(group)
            return self._clip_by_torch(param_groups, factor, grads, max_norm, norm_type, error_if_nonfinite, 1.0)
        norm, new = self._clipped(computed, factor, max_norm, norm_type, error_if_nonfinite, 1.0)
        exact = norm if computed[0] is None else computed[0]  # a 16-bit dtype may overflow
        self._remember(param_groups, grads, new, exact, unscales=False)
        return norm if grads is None else norm.to(_real_dtype(param_groups))

    def in_step(
        self, param_groups: list[dict[str, Any]], max_norm: float | None, inv_grad_scale: float, group: Any
    ) -> tuple[float | Tensor, StandIns | None, Tensor | None]:
        """Factor and stand-ins for a step, and with a `max_norm` the norm of the gradients times `inv_grad_scale`.

        Nothing is remembered, so that a step that fails ends nothing.
        """
        if max_norm is None:
            return *self.current(param_groups), None
        factor, grads = self._current_on_ranks(param_groups, group)
        computed = self._norm_of(param_groups, grads, 2.0, group)
        if computed is None:
            _refuse(group)
            return 1.0, None, self._clip_by_torch(param_groups, factor, grads, max_norm, 2.0, False, inv_grad_scale)
        norm, new = self._clipped(computed, factor, max_norm, 2.0, False, inv_grad_scale)
        return new, grads, norm if grads is None else norm.to(_real_dtype(param_groups))

    def in_step_on_device(
        self, param_groups: list[dict[str, Any]], max_norm: float | None, grad_scale: Tensor | None, group: Any
    ) -> tuple[float | Tensor, StandIns | None, Tensor | None] | None:
        """The same; a factor that is a tensor has 1 / `grad_scale` in it. None where the host must know."""
        factor, grads = self.current(param_groups) if max_norm is None else self._current_on_ranks(param_groups, group)
        if max_norm is not None:
            computed = self._norm_of(param_groups, grads, 2.0, group)
            if computed is None or computed[0] is not None:
                return None
            new, norm = self._norms.conclude(self._on_device(factor), None, grad_scale, max_norm)
            return new, grads, norm
        if isinstance(factor, Tensor) and grad_scale is not None:
            factor = self._norms.conclude(factor, None, grad_scale, None)[0]
        return factor, grads, None

    def _norm_of(
        self,
        param_groups: list[dict[str, Any]],
        grads: StandIns | None,
        norm_type: float,
        group: Any,
        remembers: bool = False,
    ) -> tuple[float | None, torch.dtype] | None:
        """Norm (None: the device knows it) and dtype; None for what only torch can do. See GradNorm for `remembers`."""
        known = self._known
        is_known = grads is None and known is not None and known[0] == norm_type and known[3] is group
        if known is not None and is_known and self._is_same and not self._norms.has_ranks:  # others may have to compute
            return known[1:3]
        return self._norms.compute(param_groups, norm_type, remembers, grads, group)

    def _clipped(
        self,
        computed: tuple[float | None, torch.dtype],
        factor: float | Tensor,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        inv_grad_scale: float,
    ) -> tuple[Tensor, float | Tensor]:
        """The norm as torch returns it, and the factor with the coefficient that clips in it."""
        norm, dtype = computed
        if norm is not None:  # in double until here: only what is returned may overflow a 16-bit dtype
            norm *= abs(float(factor) * inv_grad_scale)
            returned, coefficient = clip_by_norm(norm, dtype, max_norm, norm_type, error_if_nonfinite)
            return returned, factor * coefficient
        scale = self._on_device(inv_grad_scale, torch.float32)
        new, returned = self._norms.conclude(self._on_device(factor), scale, None, max_norm)
        if error_if_nonfinite and not math.isfinite(float(returned)):
            _raise_nonfinite(norm_type)
        # A step that multiplies with a number of the host's does not stay on the device: it may wait here.
        return returned, new if scale is None else float(new) / inv_grad_scale

    def _on_device(self, factor: float | Tensor, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """Where the gradients are; None for 1."""
        if isinstance(factor, Tensor):
            return factor
        return None if factor == 1.0 else torch.full((), factor, dtype=dtype, device=f"cuda:{self._norms.device}")

    def _remember(
        self,
        param_groups: list[dict[str, Any]],
        grads: StandIns | None,
        factor: float | Tensor,
        norm: float | Tensor | None,
        unscales: bool,
    ) -> None:
        """The gradients that are there now have this factor; with stand-ins, each has it besides its own."""
        before = self._coefficients
        unscales = unscales or any(each.unscales and not each.was_left_out for each in before)
        if grads is None:
            self._coefficients = [_Coefficient(factor, norm, unscales)]
            absent = 0 if self._is_same else self._norms.remember(param_groups, None, 1 if before else 0)
        else:
            codes = [max(code, -1) for _, _, code in self._norms.match(param_groups) or []]
            kinds = sorted(set(codes))
            factors = [before[code].factor if code >= 0 else 1.0 for code in kinds]
            self._coefficients = [_Coefficient(each * factor, norm, unscales) for each in factors]
            absent = self._norms.remember(param_groups, [kinds.index(code) for code in codes], len(kinds))
        self._coefficients += before if absent else []
        if len(self._coefficients) > 1:  # on a device there are places for one and the one before
            for each in self._coefficients:
                each.factor = each.factor.clone() if isinstance(each.factor, Tensor) else each.factor
        if grads is not None or not self._is_same:  # unscale_() has found it for others
            self._known = None
        self.traced = None
        self.is_active = True

    def _clip_by_torch(
        self,
        param_groups: list[dict[str, Any]],
        factor: float | Tensor,
        grads: StandIns | None,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        inv_grad_scale: float,
    ) -> Tensor:
        """Other norms, devices and layouts: torch's own functions, which write to the gradients."""
        _check_memory(param_groups)
        params = _with_grad(param_groups)
        if grads is not None or not _is_one(factor):
            with torch.no_grad():
                for param in params:
                    if grads is None:
                        param.grad.mul_(factor)
                    elif param in grads:
                        param.grad.copy_(grads[param])
        self.end_step(param_groups)  # what they had is written into them
        norm = torch.nn.utils.get_total_norm([param.grad for param in params], norm_type, error_if_nonfinite)
        norm = norm * inv_grad_scale
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm


def clip_by_norm(
    norm: float, dtype: torch.dtype, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> tuple[Tensor, float]:
    """The norm as torch returns it, and the coefficient that clips: torch's formula and rounding."""
    if error_if_nonfinite and not math.isfinite(norm):
        _raise_nonfinite(norm_type)
    return _C.clip_by_norm(norm, dtype, max_norm)


def _refuse(process_group: Any) -> None:
    """Torch's functions know nothing of it."""
    if process_group is not None:
        raise RuntimeError(
            "process_group: norms over it need gradients that the kernels read (dense, all on one device, and a norm "
            "of order 1, 2 or inf); keep the others in an optimizer of their own"
        )


def _with_grad(param_groups: list[dict[str, Any]]) -> list[Any]:
    """Parameters that have a gradient, each once."""
    params = {id(param): param for group in param_groups for param in group["params"]}
    return [param for param in params.values() if param.grad is not None]


def _check_memory(param_groups: list[dict[str, Any]]) -> None:
    """Before torch's operators read gradients, which would follow a pointer to nothing."""
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                _C.check_memory(param.grad, f"gradient of param_groups[{g}]['params'][{i}]")


def _real_dtype(param_groups: list[dict[str, Any]]) -> torch.dtype:
    """The dtype in which torch returns the norm of these gradients."""
    dtypes: list[torch.dtype] = [param.grad.dtype.to_real() for param in _with_grad(param_groups)]
    return functools.reduce(torch.promote_types, dtypes)


@torch.no_grad()
def _multiplied(grad: Any, factor: float | Tensor) -> Tensor:
    """A stand-in for a gradient, in the precision that the step computes in."""
    exact = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    return exact * factor  # type: ignore[no-any-return]


def _raise_nonfinite(norm_type: float) -> None:
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        "`error_if_nonfinite=False`"
    )


def _is_one(factor: float | Tensor) -> bool:
    """Without a look at the device."""
    return not isinstance(factor, Tensor) and factor == 1.0
