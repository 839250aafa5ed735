"""Clipping and unscaling that ride in the next step: the gradients are read, never written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from momentum_ext import _C

__all__ = ["GradFactor", "clip_by_norm"]


class GradFactor:
    """What the next step multiplies the gradients with, and for which gradients that was worked out.

    The factor belongs to the gradients that were there when it was worked out. Gradients that have all been replaced
    since (another backward from None) are not clipped by it. If only some have, if they were written to, or if they are
    still to be unscaled, what is meant cannot be told, and :meth:`current` raises. ``zero_grad`` clears it.
    """

    def __init__(self) -> None:
        self.is_active = False  # an attribute, because each step asks
        self.traced: Tensor | None = None  # the factor of a compiled function, where nobody has read its value
        self._norms = _C.GradNorm()
        self._factor = 1.0
        self._unscales = False
        self._known: tuple[float, float, torch.dtype] | None = (
            None  # norm_type, norm of the gradients as they are, dtype
        )

    def current(self, param_groups: list[dict[str, Any]]) -> float:
        """The factor for the gradients that are there now.

        Raises:
            RuntimeError: for gradients that are partly others than those that were clipped.
        """
        if self.traced is not None:
            return float(self.traced)
        if self._factor == 1.0:
            return 1.0
        found = self._norms.compare(param_groups)
        if found == "changed":
            raise RuntimeError(
                "some gradients were written to or replaced after clip_grad_norm_() or unscale_(), which take effect "
                "in step(); clip after the last backward(), or call zero_grad() to start again"
            )
        if found == "replaced":
            if self._unscales:
                raise RuntimeError(
                    "all gradients were replaced after unscale_(), which takes effect in step(): the new ones may "
                    "still be scaled; change them before unscale_(), or call zero_grad() to start again"
                )
            self.clear()
        return self._factor

    def snapshot(self) -> tuple[float, bool, bool]:
        """To be given to :meth:`restore` when a step fails."""
        return self._factor, self._unscales, self.is_active

    def restore(self, snapshot: tuple[float, bool, bool]) -> None:
        self._factor, self._unscales, self.is_active = snapshot
        self._known = None

    def clear(self) -> None:
        """After the step."""
        self.traced = None
        self._factor = 1.0
        self._unscales = False
        self._known = None
        self.is_active = False

    def unscale(self, param_groups: list[dict[str, Any]], inv_scale: float) -> bool | None:
        """Have the next step multiply with `inv_scale`. True: all gradients are finite; None: torch must do it."""
        factor = self.current(param_groups)
        computed = self._norms.compute(param_groups, 2.0)
        if computed is None:
            return None
        self.traced = None
        self._factor = factor * inv_scale
        self._unscales = self._unscales or inv_scale != 1.0
        self.is_active = True
        self._known = (2.0, *computed)
        return math.isfinite(computed[0])

    def clip(
        self,
        param_groups: list[dict[str, Any]],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        inv_grad_scale: float = 1.0,
    ) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, for the gradients times the factor; the factor takes the coefficient.

        `inv_grad_scale` is what the step will multiply with besides.
        """
        factor = self.current(param_groups)
        known, self._known = self._known, None
        if known is None or known[0] != norm_type or self._norms.compare(param_groups) != "same":
            computed = self._norms.compute(param_groups, norm_type)
            if computed is None:
                return self._clip_by_torch(
                    param_groups, factor, max_norm, norm_type, error_if_nonfinite, inv_grad_scale
                )
            known = (norm_type, *computed)
        _, norm, dtype = known
        # In double until here: only what is returned may overflow a 16-bit dtype.
        norm *= abs(factor * inv_grad_scale)
        returned, coefficient = clip_by_norm(norm, dtype, max_norm, norm_type, error_if_nonfinite)
        self.traced = None
        self._factor = factor * coefficient
        self.is_active = True
        return returned

    def _clip_by_torch(
        self,
        param_groups: list[dict[str, Any]],
        factor: float,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        inv_grad_scale: float,
    ) -> Tensor:
        """Other norms, devices and layouts: torch's own functions, which write to the gradients."""
        params = list(_with_grad(param_groups))
        grads = [param.grad for param in params if param.grad is not None]
        if factor != 1.0:
            with torch.no_grad():
                for grad in grads:
                    grad.mul_(factor)
        self.clear()
        norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite) * inv_grad_scale
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm


def clip_by_norm(
    norm: float, dtype: torch.dtype, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> tuple[Tensor, float]:
    """The norm as torch returns it, and the coefficient that clips: torch's formula and rounding."""
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    precise = torch.tensor(norm, dtype=torch.promote_types(dtype, torch.float32))
    return precise.to(dtype), (max_norm / (precise + 1e-6)).clamp(max=1.0).item()


def _with_grad(param_groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Parameters that have a gradient, each once."""
    seen = set()
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and id(param) not in seen:
                seen.add(id(param))
                yield param
