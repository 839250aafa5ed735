"""How an optimizer of ours steps: hooks, closure, a GradScaler's numbers, clipping and averages, and the plan."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from momentum_ext import _C, compiled
from momentum_ext.averaging import average_weight, swapped
from momentum_ext.clipping import StandIns
from momentum_ext.fallback import check_on_stand_ins
from momentum_ext.keys import COUNTERS
from momentum_ext.memory import MemorySummary, summarize
from momentum_ext.precision import (
    check_low_precision_step,
    is_in_blocks,
    low_precision_step,
    needs_low_precision_step,
)
from momentum_ext.state import StatefulOptimizer

__all__ = ["FusedOptimizer"]


@dataclass
class _Numbers:
    """What a step multiplies gradients with, and what a GradScaler knows on a CUDA device alone."""

    factor: float | Tensor
    grads: StandIns | None  # gradients that have factors of their own, multiplied
    norm: Tensor | None  # of all gradients, where max_grad_norm asks for it
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


class FusedOptimizer(StatefulOptimizer):
    """The steps of our optimizers, apart from torch's own path."""

    @staticmethod
    def _update_by_torch(group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        """Torch's own update of one tensor and its state, which on a first step has nothing."""
        raise NotImplementedError

    def _torch_step(self, positions: list[tuple[int, int]], grad_factor: float, grads: StandIns) -> None:
        """Torch's own update of the tensors at these (group, index in group), with gradients times `grad_factor`."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                grad = grads.get(param, param.grad)
                grad = grad if grad_factor == 1.0 else grad * grad_factor
                if needs_low_precision_step(group, param, self.state.get(param, {})):
                    states = self._states_of(group)
                    low_precision_step(group, param, grad, self.state[param], states, self._update_by_torch)
                else:
                    self._update_by_torch(group, param, grad, self.state[param])

    def _check_torch_step(self, positions: list[tuple[int, int]]) -> None:
        """Let torch raise on one-element stand-ins what it would raise for these tensors, while nothing is written."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                if param.is_cuda and not _C.HAS_CUDA_KERNELS:
                    _warn_of_missing_kernels(type(self).__name__)
                states = self._states_of(group)
                entry = {key: each for key, each in self.state.get(param, {}).items() if key in (*states, *COUNTERS)}
                if needs_low_precision_step(group, param, self.state.get(param, {})):
                    name = f"param_groups[{g}]['params'][{i}]"
                    check_low_precision_step(group, param, states, self.defaults["differentiable"], name)
                    # Torch gets values of its parameter's kind.
                    in_blocks = [key for key in states if is_in_blocks(entry.get(key), param)]
                    entry |= dict.fromkeys(in_blocks, param.detach())
                check_on_stand_ins(self._update_by_torch, group, param, param.grad, entry)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Under ``torch.compile`` the step becomes the operator ``torch.ops.momentum_ext.step``, with the eager step's
        bits. lr and weight_decay as tensors may change in value without a new graph; Python numbers that change make a
        new one, and so does the second step, which finds momentum buffers, as with torch's optimizers. Closures, step
        hooks, GradScaler's attributes, ``differentiable=True``, an edited formulation and a parameter that is listed
        twice are left to the eager step between two graphs; with ``fullgraph=True`` torch's error says which it was.

        While ``torch.profiler`` is active, each step has a range ``FusedMomentum.step: N bytes``, by the class's name.
        N bytes must move, to read parameter, gradient and states (momentum's buffer is not read in a tensor's first
        step), write parameter and states, and read and write the average. It counts what the
        kernels update, not what is left to torch.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError, TypeError, ValueError: naming the tensor or the hyperparameter; nothing has been written.
        """
        if is_dynamo_compiling():
            return compiled.step(self, args, kwargs)  # type: ignore[no-any-return]
        # torch wraps a step in hooks and a profiler range at 20 us a call; here it is wrapped when there is someone to
        # notice. A subclass that overrides step() has been wrapped by torch, and its hooks must not run twice.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _C.has_record_function_callbacks()
        ) and not self._is_wrapped_by_torch():
            run = _observed_step
        else:
            run = FusedOptimizer._step
        try:
            return run(self, *args, **kwargs)
        except BaseException:  # torch.amp.GradScaler would multiply what it finds here into its next scale
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    step.hooked = True  # type: ignore[attr-defined]  # torch's word for "already wrapped"
    _own_step = step  # for a subclass that overrides it

    def _is_wrapped_by_torch(self) -> bool:
        """True for a subclass's own step(), which torch has wrapped; not for a wrapper that someone put around ours."""
        inner = getattr(type(self).step, "__wrapped__", None)
        return inner is not None and not getattr(inner, "hooked", False)

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        if self._held_weights.context is not None:  # before the closure writes gradients
            self._held_weights.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        if (
            self.max_grad_norm is None
            and self.ema_decay is None
            and not self._grad_factor.is_active
            and "found_inf" not in attributes
            and "grad_scale" not in attributes
        ):
            prepared = self._plan.step(self.param_groups, self.state, self.defaults["differentiable"])
            if prepared is not None:
                with prepared:
                    self._finish(prepared, 1.0, {})
        else:
            self._step_and_more(attributes.get("found_inf"), attributes.get("grad_scale"))
        return loss

    def _step_and_more(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """The step with what a GradScaler hands over, clipping and averages."""
        # A step with lr 0 makes state, and is otherwise no step: see the class.
        trains = any(_is_nonzero(group["lr"]) for group in self.param_groups)
        numbers = self._numbers_on_device(found_inf, grad_scale)
        if numbers is None or not self._run(numbers, trains):
            if found_inf is not None and float(found_inf) != 0:
                self._grad_factor.clear()
                return
            inv_grad_scale = 1.0 if grad_scale is None else _C.inverse_scale(float(grad_scale))
            factor, grads, norm = self._grad_factor.in_step(
                self.param_groups, self.max_grad_norm, inv_grad_scale, self.process_group
            )
            if inv_grad_scale != 1.0:
                factor = inv_grad_scale * float(factor)
            numbers = _Numbers(factor, grads, norm)
            self._run(numbers, trains)
        if trains and self.max_grad_norm is not None:
            self.grad_norm = numbers.norm
        if self._grad_factor.is_active:
            self._grad_factor.end_step(self.param_groups)
        if trains and self.ema_decay is not None:
            self._ema_count.add()

    def _numbers_on_device(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> _Numbers | None:
        """Those of a GradScaler that only a device knows; None where the host must know them, or there is none."""
        if found_inf is grad_scale or not (_is_on_device(found_inf) and _is_on_device(grad_scale)):
            return None
        in_step = self._grad_factor.in_step_on_device(
            self.param_groups, self.max_grad_norm, grad_scale, self.process_group
        )
        if in_step is None:
            return None
        factor, grads, norm = in_step
        if isinstance(factor, Tensor):
            grad_scale = None  # it is in the factor
        elif factor != 1.0:
            return None
        return _Numbers(factor, grads, norm, found_inf, grad_scale)

    def _run(self, numbers: _Numbers, trains: bool) -> bool:
        """The step; False, and nothing has been written, where a GradScaler's numbers cannot stay on their device."""
        averaging = None if self.ema_decay is None else trains
        scaled_on_device = numbers.found_inf is not None or numbers.grad_scale is not None
        count = self._ema_count
        average = None
        if averaging:
            may_warm_up_there = numbers.found_inf is not None or self.ema_warmup
            average = count.on_device(self._first_device(), may_warm_up_there)
            if average is None and numbers.found_inf is not None:
                return False
        with self._plan.prepare(
            self.param_groups,
            self.state,
            self.defaults["differentiable"],
            averaging,
            numbers.grads,
            numbers.found_inf is not None,
        ) as prepared:
            factor, on_device = numbers.factor, None
            if isinstance(factor, Tensor):
                factor, on_device = 1.0, factor
            if (scaled_on_device or on_device is not None or average is not None) and not prepared.is_on_devices(
                None if average is None else average[1]
            ):
                if scaled_on_device:
                    return False
                factor, on_device = float(numbers.factor), None
                if average is not None:
                    count.bring_back()
                    average = None
            weight = 0.0
            if averaging and self.ema_decay is not None and average is None:
                weight = average_weight(self.ema_decay, self.ema_warmup, int(count))
            self._finish(
                prepared,
                factor,
                numbers.grads or {},
                average_weight=weight,
                found_inf=numbers.found_inf,
                grad_scale=numbers.grad_scale,
                device_factor=on_device,
                average=average,
                ema_decay=self.ema_decay or 0.0,
                ema_warmup=self.ema_warmup,
            )
        return True

    def _finish(self, prepared: _C.PreparedStep, factor: float, grads: StandIns, **numbers: Any) -> None:
        """What only torch can update, and then the rest."""
        if positions := prepared.fallback():
            self._check_torch_step(positions)
            prepared.begin()
            self._torch_step(positions, factor, grads)
        prepared.run(factor, **numbers)

    def _first_device(self) -> torch.device:
        params = (param for group in self.param_groups for param in group["params"])
        return next((param.device for param in params if isinstance(param, Tensor)), torch.device("cpu"))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context, parameters are their averages; needs ``ema_decay``.

        Parameters and averages change places in memory, without a copy of the model, and come back bit for bit. A
        parameter that has never had a gradient is its own average. :meth:`step` and :meth:`state_dict` raise inside.

        Example::

            with optimizer.ema_weights():
                evaluate(model)
        """
        if self.ema_decay is None:
            raise RuntimeError("ema_weights() needs an optimizer that was made with ema_decay")
        with self._held_weights.hold("ema_weights"), swapped(self.state):
            yield

    def memory_summary(self) -> MemorySummary:
        """Bytes of parameters, gradients and state by kind, with today's options; prints as a table.

        Counts what a step with all gradients will have allocated, so it is the same before the first step and after.
        """
        return summarize(self.param_groups, self.state, self._states_of, self.ema_decay is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; what was to clip the gradients goes with them."""
        if is_dynamo_compiling():
            compiled.zero_grad(self, set_to_none)
            return
        self._grad_factor.clear()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        process_group: Any = None,
    ) -> Tensor:
        """Clip the norm of all gradients together, in the next :meth:`step`.

        Takes the place of ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)``. The norm is computed now,
        in one pass that only reads; the step multiplies with the coefficient while it reads the gradients anyway, so
        ``param.grad`` keeps its values. Norms 1, 2 and inf of gradients that are all on the CPU, or all dense on one
        CUDA device, are computed in double, with the same bits on every run; for all else torch's own functions are
        called, which write to the gradients. On a CUDA device nothing waits: norm and coefficient stay there, and both
        can be captured into a graph, max_norm as the number that it is then.

        The coefficient belongs to the memory of these gradients, as if it had been written there. Called again, it
        clips what the first call has left. A gradient that is replaced before the step by one in other memory is not
        clipped, the others are; what is written to them through ``p.grad.data`` goes unseen. :meth:`zero_grad`, the
        step that uses it and a step that a ``momentum_ext.GradScaler`` leaves out end it; a step that raises does not.
        Gradients that are written to before the step (another backward) make it raise: clip last. After an overflow,
        whose norm is not finite, they are simply not clipped. A copy of the optimizer has other gradients: clip them
        again. A clip in a compiled function does not see what happens to the gradients before an eager step.

        Args:
            max_norm: what the norm shall not exceed.
            norm_type: the p of the p-norm, may be ``inf``.
            foreach: accepted as torch's function does; has no effect.
            error_if_nonfinite: raise if the norm is inf or NaN, instead of multiplying with what comes out; waits for
                a CUDA device.
            process_group: whose ranks hold other parameters of the same model (pipeline and expert parallelism): the
                norm is over all of theirs. None: that of the constructor.

        The norm of DTensors is over all their shards, with one all-reduce for each mesh, and then on the CPU. Which
        collectives run depends on the parameters alone, unless gradients have other placements than they; an error in
        one rank's gradients raises on all of them.

        Returns:
            The norm before clipping, a tensor of no dimension in the gradients' dtype, on their device.

        Raises:
            RuntimeError: for a norm that is not finite, if asked for; for a gradient that was written to after the
                last clipping, with its place in ``param_groups``.
        """
        group = self.process_group if process_group is None else process_group
        if is_dynamo_compiling():
            return compiled.clip_grad_norm_(self, max_norm, norm_type, error_if_nonfinite, group)
        return self._grad_factor.clip(self.param_groups, float(max_norm), float(norm_type), error_if_nonfinite, group)


def _is_on_device(value: Tensor | None) -> bool:
    """True where the CUDA kernels can read a GradScaler's value by themselves, or where there is none."""
    return value is None or (
        isinstance(value, Tensor) and value.is_cuda and value.dtype == torch.float32 and value.numel() == 1
    )


def _is_nonzero(lr: Any) -> bool:
    """False for an lr of 0, without waiting for a device."""
    return lr.is_cuda or bool(lr != 0) if isinstance(lr, Tensor) else lr != 0


# torch's wrapper: a profiler range, the hooks, and the mark that its Python tracer looks for.
_observed_step = Optimizer.profile_hook_step(FusedOptimizer._step)


@functools.cache
def _warn_of_missing_kernels(name: str) -> None:
    """Once in a process."""
    warnings.warn(
        f"momentum_ext was built without CUDA kernels, so {name} updates CUDA tensors by torch's for-loop: "
        "right, but slow. Build it again where nvcc is found (set CUDA_HOME) and torch has CUDA: "
        "FORCE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .  (in its source tree)",
        stacklevel=2,
    )


# Hooks see the arguments as they were given, hence step's *args; people and tools see what it takes.
FusedOptimizer.step.__signature__ = inspect.signature(FusedOptimizer._step)  # type: ignore[attr-defined]
