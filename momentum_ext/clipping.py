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

    For CUDA gradients it is a tensor on their device, which the host does not read. It lives in one of two places that
    take turns: a captured graph finds it where it was, and the one before is there as long as a step may yet fail.

    The factor belongs to the gradients that were there when it was worked out. Gradients that have all been replaced
    since (another backward from None) are not clipped by it. If only some have, if they were written to, or if they are
    still to be unscaled, what is meant cannot be told, and :meth:`current` raises. ``zero_grad`` clears it.
    """

    def __init__(self) -> None:
        self.is_active = False  # an attribute, because each step asks
        self.traced: Tensor | None = None  # the factor of a compiled function, where nobody has read its value
        self._norms = _C.GradNorm()
        self._factor: float | Tensor = 1.0
        self._unscales = False
        self._known: tuple[float, float | None, torch.dtype] | None = (
            None  # norm_type, norm of the gradients as they are (None: the device knows), dtype
        )

    def current(self, param_groups: list[dict[str, Any]]) -> float | Tensor:
        """The factor for the gradients that are there now.

        Raises:
            RuntimeError: for gradients that are partly others than those that were clipped.
        """
        if self.traced is not None:
            return float(self.traced)
        if _is_one(self._factor):
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

    def snapshot(self) -> tuple[float | Tensor, bool, bool, Tensor | None]:
        """To be given to :meth:`restore` when a step fails."""
        return self._factor, self._unscales, self.is_active, self.traced

    def restore(self, snapshot: tuple[float | Tensor, bool, bool, Tensor | None]) -> None:
        self._factor, self._unscales, self.is_active, self.traced = snapshot
        self._known = None

    def clear(self) -> None:
        """After the step."""
        self.traced = None
        self._factor = 1.0
        self._unscales = False
        self._known = None
        self.is_active = False

    def unscale(self, param_groups: list[dict[str, Any]], inv_scale: Tensor, only_checks: bool) -> Tensor | None:
        """Have the next step multiply with `inv_scale`, which is 1 where it only checks.

        Returns torch.amp.GradScaler's found_inf, on the gradients' device; None: torch must do it.
        """
        factor = self.current(param_groups)
        computed = self._norms.compute(param_groups, 2.0)
        if computed is None:
            return None
        self.traced = None
        norm, dtype = computed
        if norm is None:
            new, found_inf = self._norms.conclude(_on_device(factor), None if only_checks else inv_scale, None, None)
            self._factor = factor if only_checks else new
        else:
            found_inf = torch.full((), 0.0 if math.isfinite(norm) else 1.0)
            self._factor = factor if only_checks else factor * float(inv_scale)
        self._unscales = self._unscales or not (only_checks or (norm is not None and float(inv_scale) == 1.0))
        self.is_active = True
        self._known = (2.0, norm, dtype)
        return found_inf

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
        known = self._norm(param_groups, norm_type)
        if known is None:
            return self._clip_by_torch(param_groups, factor, max_norm, norm_type, error_if_nonfinite, inv_grad_scale)
        norm, dtype = known
        if norm is None:
            device = next(param.grad.device for param in _with_grad(param_groups) if param.grad is not None)
            return self._clip_on_device(device, factor, max_norm, norm_type, error_if_nonfinite, inv_grad_scale)
        # In double until here: only what is returned may overflow a 16-bit dtype.
        norm *= abs(float(factor) * inv_grad_scale)
        returned, coefficient = clip_by_norm(norm, dtype, max_norm, norm_type, error_if_nonfinite)
        self.traced = None
        self._factor = factor * coefficient
        self.is_active = True
        return returned

    def clip_and_unscale(
        self, param_groups: list[dict[str, Any]], max_norm: float, grad_scale: Tensor | None
    ) -> Tensor | None:
        """As :meth:`clip`, of CUDA gradients by their 2-norm; the factor takes 1 / grad_scale as well.

        None, and nothing has changed, where the host must read grad_scale.
        """
        factor = self.current(param_groups)
        known = self._norm(param_groups, 2.0)
        if known is None or known[0] is not None:
            return None
        self._factor, norm = self._norms.conclude(_on_device(factor), None, grad_scale, max_norm)
        self.is_active = True
        return norm

    def take_scale(self, param_groups: list[dict[str, Any]], grad_scale: Tensor) -> Tensor:
        """A factor on the device that has 1 / grad_scale in it."""
        factor = _on_device(self.current(param_groups))
        self._factor, _ = self._norms.conclude(factor, None, grad_scale, None)
        return self._factor

    def _norm(self, param_groups: list[dict[str, Any]], norm_type: float) -> tuple[float | None, torch.dtype] | None:
        """Norm (None: the device knows it) and dtype; None for what only torch can do."""
        known, self._known = self._known, None
        if known is not None and known[0] == norm_type and self._norms.compare(param_groups) == "same":
            return known[1:]
        return self._norms.compute(param_groups, norm_type)

    def _clip_on_device(
        self,
        device: torch.device,
        factor: float | Tensor,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        inv_grad_scale: float,
    ) -> Tensor:
        scale = None if inv_grad_scale == 1.0 else torch.full((), inv_grad_scale, device=device)
        new, norm = self._norms.conclude(_on_device(factor), scale, None, max_norm)
        if error_if_nonfinite and not math.isfinite(norm.item()):
            _raise_nonfinite(norm_type)
        # A step that multiplies with a number of the host's does not stay on the device: it may wait here.
        self._factor = new if scale is None else float(new) / inv_grad_scale
        self.is_active = True
        return norm

    def _clip_by_torch(
        self,
        param_groups: list[dict[str, Any]],
        factor: float | Tensor,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        inv_grad_scale: float,
    ) -> Tensor:
        """Other norms, devices and layouts: torch's own functions, which write to the gradients."""
        params = list(_with_grad(param_groups))
        grads = [param.grad for param in params if param.grad is not None]
        if not _is_one(factor):
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
        _raise_nonfinite(norm_type)
    return _C.clip_by_norm(norm, dtype, max_norm)


def _with_grad(param_groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Parameters that have a gradient, each once."""
    seen = set()
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None and id(param) not in seen:
                seen.add(id(param))
                yield param


def _raise_nonfinite(norm_type: float) -> None:
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
        "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        "`error_if_nonfinite=False`"
    )


def _is_one(factor: float | Tensor) -> bool:
    """Without a look at the device."""
    return not isinstance(factor, Tensor) and factor == 1.0


def _on_device(factor: float | Tensor) -> Tensor | None:
    return factor if isinstance(factor, Tensor) else None
