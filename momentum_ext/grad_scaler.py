"""torch.amp.GradScaler without a pass of its own over the gradients."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from momentum_ext.fused import FusedOptimizer

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """A :class:`torch.amp.GradScaler` that only reads the gradients of a FusedMomentum.

    Used as torch's, with the same arguments and in the same order of calls::

        scaler = momentum_ext.GradScaler("cpu")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)             # looks for infs and NaNs: one read of the gradients
        optimizer.clip_grad_norm_(1.0)         # nothing to read: the norm is what was looked at
        scaler.step(optimizer)                 # unscales and clips while it reads them for the update
        scaler.update()

    ``unscale_`` leaves ``param.grad`` scaled: what it means takes effect in the step. So clip by the optimizer's
    method, not by torch's function, which would write to gradients that are still scaled (the step then raises), and
    take torch's scaler where hooks or trainers want to see unscaled gradients between ``unscale_`` and ``step``. On a
    CUDA device nothing waits for the numbers: all of it is one pass that reads the gradients and one that updates. The
    optimizer's ``step()`` is called after an overflow, too, and does nothing then.

    Other optimizers, and gradients that the kernels are not made for (sparse, on several devices), are treated by torch
    as ever. A default dtype or device has no effect.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's; a FusedMomentum is handed scale and overflow, whether it was made with ``fused=True`` or not."""
        if not isinstance(optimizer, FusedOptimizer) or "_step_supports_amp_scaling" in optimizer.__dict__:
            return super().step(optimizer, *args, **kwargs)
        optimizer._step_supports_amp_scaling = True
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            del optimizer._step_supports_amp_scaling

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As torch's."""
        for optimizer in self._unscaled:
            optimizer._grad_factor.outlive_scaler()
        self._unscaled.clear()
        super().update(new_scale)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_unscaled", None)
        return state

    @functools.cached_property
    def _unscaled(self) -> weakref.WeakSet[FusedOptimizer]:
        return weakref.WeakSet()

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if isinstance(optimizer, FusedOptimizer):
            factor = optimizer._grad_factor
            # Without unscale_(), torch asks for fp16 too and gives 1: step() gets the scale itself.
            ours = factor.unscale(optimizer.param_groups, inv_scale, allow_fp16, optimizer.process_group)
            self._unscaled.add(optimizer)
            if ours is not None:
                return {ours.device: ours} if factor.has_grads else {}
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
