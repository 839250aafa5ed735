"""FusedMomentum: torch.optim.SGD's momentum and Nesterov in one pass over memory."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.optim.sgd import sgd

from momentum_ext import _C

__all__ = ["FusedMomentum"]


class FusedMomentum(SGD):
    r"""Momentum and Nesterov SGD that updates a whole list of tensors in one pass.

    Takes the place of :class:`torch.optim.SGD`: the same arguments, the same ``param_groups`` and state
    (``"momentum_buffer"``), state dicts that load into either, and in fp32 and fp64 the same bits as
    ``SGD(foreach=False, fused=False)``. For each element, with :math:`g` the gradient (negated if ``maximize``),
    :math:`p` the parameter and :math:`b` the momentum buffer:

    .. math::
        g &\leftarrow g + \lambda p                     &&\text{if weight\_decay } \lambda \neq 0 \\
        b &\leftarrow \mu b + (1 - \tau) g              &&\text{momentum } \mu \text{, dampening } \tau;
                                                            \text{ first step of a tensor: } b \leftarrow g \\
        d &\leftarrow g + \mu b \text{ if nesterov, else } b \\
        p &\leftarrow p - \gamma d                      &&\text{lr } \gamma

    This is the formula of :class:`torch.optim.SGD`; Nesterov's form is that of Sutskever et al., "On the importance of
    initialization and momentum in deep learning" (ICML 2013), seen from the look-ahead point.

    16-bit tensors are computed in fp32 and rounded once for each stored value. A momentum buffer is made with its
    parameter's dtype and layout; one that is found in another dtype or layout is used as it is.

    Args:
        params: tensors or dicts of parameter groups, of any shape and layout. fp32, fp64, bf16, fp16, complex64 and
            complex128 tensors on the CPU and on CUDA devices are fused, in one pass over all groups. Everything else
            that torch.optim.SGD can update (sparse gradients, other dtypes and devices, tensor subclasses) takes
            torch's own path from the same step.
        lr: learning rate, a float or a tensor of one element (default: 1e-3). A CUDA tensor on its parameters'
            device is read by the kernel, and so are weight_decay and momentum: a captured graph sees them change.
        momentum: momentum factor (default: 0); a CUDA tensor counts as not zero.
        dampening: dampening of the gradient in the momentum buffer (default: 0).
        weight_decay: L2 penalty, a float or a tensor of one element (default: 0).
        nesterov: Nesterov momentum; needs momentum and no dampening (default: False).
        maximize: maximize the objective instead of minimizing (default: False).
        foreach: accepted so that one line is enough to change; has no effect.
        differentiable: step through autograd; takes torch's path (default: False).
        fused: accepted so that one line is enough to change; has no effect.

    Raises:
        ValueError, TypeError, RuntimeError: where torch.optim.SGD raises them, and from :meth:`step` for a tensor that
            cannot be updated, with its position in ``param_groups``; nothing has been written then.

    Example::

        optimizer = momentum_ext.FusedMomentum(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.zero_grad()
        loss_fn(model(input), target).backward()
        optimizer.step()
    """

    # torch.amp.GradScaler then hands over grad_scale and found_inf instead of rewriting the gradients.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._plan = _C.StepPlan()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = _C.StepPlan()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_unstarted_buffers()
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.SGD.state_dict`."""
        self._forget_unstarted_buffers()
        return super().state_dict()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError, TypeError, ValueError: naming the tensor or the hyperparameter; nothing has been written.
        """
        # torch wraps a step in hooks and a profiler range at 20 us a call; here it is wrapped when there is someone to
        # notice. A subclass that overrides step() has been wrapped by torch, and its hooks must not run twice.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _C.has_record_function_callbacks()
        ) and not _is_wrapped_by_torch(type(self).step):
            return _observed_step(self, *args, **kwargs)
        return self._step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch's word for "already wrapped"
    # A compiled training loop calls the step as it is: there is nothing in it to compile.
    step._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        inv_grad_scale = 1.0
        differentiable = self.defaults["differentiable"]
        attributes = self.__dict__
        for_torch = NotImplemented
        if "found_inf" in attributes or "grad_scale" in attributes:
            found_inf, grad_scale = attributes.get("found_inf"), attributes.get("grad_scale")
            if _is_on_device(found_inf) and _is_on_device(grad_scale):  # no need to wait for their values
                for_torch = self._plan.step(self.param_groups, self.state, 1.0, differentiable, found_inf, grad_scale)
            if for_torch is NotImplemented:
                if found_inf is not None and float(found_inf) != 0:
                    return loss
                inv_grad_scale = _reciprocal(grad_scale)
        if for_torch is NotImplemented:
            for_torch = self._plan.step(self.param_groups, self.state, inv_grad_scale, differentiable)
        if for_torch is not None:
            try:
                self._check_torch_step(for_torch)
                self._torch_step(for_torch, inv_grad_scale, differentiable)
            except BaseException:
                self._plan.discard()
                raise
            self._plan.run()
        return loss

    def _forget_unstarted_buffers(self) -> None:
        """Before the state leaves: a buffer whose first step overflowed on the GPU is not yet part of it."""
        unstarted = self._plan.unstarted_buffers()
        for param, state in list(self.state.items()) if unstarted else []:
            if any(state.get("momentum_buffer") is buffer for buffer in unstarted):
                del state["momentum_buffer"]
                if not state:
                    del self.state[param]

    def _torch_step(self, positions: Iterable[tuple[int, int]], inv_grad_scale: float, differentiable: bool) -> None:
        """Torch's own update of the tensors at these (group, index in group)."""
        with torch.set_grad_enabled(differentiable):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                grad = param.grad if inv_grad_scale == 1.0 else param.grad * inv_grad_scale
                has_momentum = group["momentum"] != 0
                buffers = [self.state[param].get("momentum_buffer") if has_momentum else None]
                _torch_sgd(group, [param], [grad], buffers)
                if has_momentum:
                    self.state[param]["momentum_buffer"] = buffers[0]

    def _check_torch_step(self, positions: Iterable[tuple[int, int]]) -> None:
        """Let torch raise on one-element stand-ins what it would raise for these tensors, while nothing is written."""
        with torch.no_grad():
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                if param.is_cuda and not _C.HAS_CUDA_KERNELS:
                    _warn_of_missing_kernels()
                buffer = self.state[param].get("momentum_buffer") if param in self.state else None
                _torch_sgd(
                    group,
                    [_stand_in(param)],
                    [_stand_in(param.grad)],
                    [_stand_in(buffer) if isinstance(buffer, Tensor) else None],
                )


def _is_wrapped_by_torch(step: Callable[..., Any]) -> bool:
    """True for a subclass's own step(), which torch has wrapped; not for a wrapper that someone put around ours."""
    inner = getattr(step, "__wrapped__", None)
    return inner is not None and not getattr(inner, "hooked", False)


def _is_on_device(value: Tensor | None) -> bool:
    """True where the CUDA kernels can read a GradScaler's value by themselves, or where there is none."""
    return value is None or (
        isinstance(value, Tensor) and value.is_cuda and value.dtype == torch.float32 and value.numel() == 1
    )


@functools.cache
def _warn_of_missing_kernels() -> None:
    """Once in a process."""
    warnings.warn(
        "momentum_ext was built without CUDA kernels, so FusedMomentum updates CUDA tensors by torch's for-loop: "
        "right, but slow. Build it again where nvcc is found (set CUDA_HOME) and torch has CUDA: "
        "FORCE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .  (in its source tree)",
        stacklevel=2,
    )


def _torch_sgd(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
    if isinstance(group["weight_decay"], Tensor) and group["weight_decay"].requires_grad:
        grads = [grad.clone() for grad in grads]  # torch would write into it
    sgd(
        params,
        grads,
        buffers,
        foreach=False,
        fused=False,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same kind and of size 1 everywhere: torch refuses it where it would refuse the original."""
    shape = (1,) * tensor.dim()
    if tensor.layout == torch.strided:
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    dense = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.layout == torch.sparse_coo:
        return dense.to_sparse(tensor.sparse_dim())
    return dense.to_sparse(layout=tensor.layout)


def _reciprocal(grad_scale: Tensor | float | None) -> float:
    """1 / grad_scale, rounded to fp32 as GradScaler.unscale_ rounds it."""
    if grad_scale is None:
        return 1.0
    return torch.tensor(1.0 / float(grad_scale), dtype=torch.float32).item()


# torch's wrapper: a profiler range, the hooks, and the mark that its Python tracer looks for.
_observed_step = Optimizer.profile_hook_step(FusedMomentum._step)
# Hooks see the arguments as they were given, hence step's *args; people and tools see what it takes.
FusedMomentum.step.__signature__ = inspect.signature(FusedMomentum._step)  # type: ignore[attr-defined]
