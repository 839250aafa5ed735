"""FusedMomentum: torch.optim.SGD's momentum and Nesterov in one pass over memory."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from momentum_ext import _C, compiled
from momentum_ext.averaging import COUNT, UpdateCount, average_weight, check_decay, swapped
from momentum_ext.checkpoint import as_torch_state_dict, keep_dtypes, settle, unpack
from momentum_ext.clipping import GradFactor
from momentum_ext.formulation import check_group, check_torch_step, torch_step
from momentum_ext.lookahead import TRAIN_MODE, check_train_mode, hold_iterate, hold_lookahead
from momentum_ext.memory import MemorySummary, summarize
from momentum_ext.precision import (
    EIGHT_BITS,
    OPTIONS,
    ROUNDING_STEP,
    check_low_precision_step,
    check_options,
    low_precision_step,
    needs_low_precision_step,
)

__all__ = ["FusedMomentum"]


class FusedMomentum(SGD):
    r"""Momentum and Nesterov SGD that updates a whole list of tensors in one pass.

    Takes the place of :class:`torch.optim.SGD`: the same arguments, the same ``param_groups`` and state
    (``"momentum_buffer"``), state dicts that load into either
    (those of a low-precision optimizer into torch's by :meth:`torch_state_dict`), and in fp32 and fp64 the same bits as
    ``SGD(foreach=False, fused=False)``. For each element, with :math:`g` the gradient (negated if ``maximize``),
    :math:`p` the parameter and :math:`b` the momentum buffer:

    .. math::
        g &\leftarrow g + \lambda p                     &&\text{if weight\_decay } \lambda \neq 0 \\
        b &\leftarrow \mu b + (1 - \tau) g              &&\text{momentum } \mu \text{, dampening } \tau;
                                                            \text{ first step of a tensor: } b \leftarrow g \\
        d &\leftarrow g + \mu b \text{ if nesterov, else } b \\
        p &\leftarrow p - \gamma d                      &&\text{lr } \gamma

    This is the formula of :class:`torch.optim.SGD`; Nesterov's form is that of Sutskever et al., "On the importance of
    initialization and momentum in deep learning" (ICML 2013), seen from the look-ahead point (see :meth:`eval`).

    The field writes momentum in other ways too; ``formulation`` chooses, for each group:

    ===============  ================================  ====================  =================================
    ``formulation``  momentum                          parameter             known from
    ===============  ================================  ====================  =================================
    ``"torch"``      :math:`b = \mu b + (1 - \tau) g`  :math:`p - \gamma b`  torch.optim.SGD
    ``"classical"``  :math:`v = \mu v + \gamma g`      :math:`p - v`         Polyak, Sutskever; Keras, Caffe
    ``"ema"``        :math:`v = \mu v + (1 - \mu) g`   :math:`p - \gamma v`  moving average, zero at the start
    ===============  ================================  ====================  =================================

    With a constant learning rate ``"torch"`` and ``"classical"`` take the same steps, :math:`v = \gamma b`. Under a
    schedule they do not: the classical velocity is a sum of gradients each times the learning rate of its own step,
    :math:`v_t = \sum_s \mu^{t-s} \gamma_s g_s`, torch's step multiplies the whole history by the present one,
    :math:`\gamma_t b_t = \sum_s \mu^{t-s} \gamma_t g_s`. So when the rate falls, the classical form goes on with its
    old speed for about :math:`1 / (1 - \mu)` steps. ``"ema"`` takes the steps of ``"torch"`` with a learning rate
    :math:`1 - \mu` times as large; there is no bias correction, so its first steps are small. With Nesterov the
    direction is :math:`\mu v + \gamma g` (classical) or :math:`\mu v + (1 - \mu) g` (ema). Without momentum all are
    :math:`p - \gamma g`. A formulation that is edited in ``param_groups`` between two steps takes effect in the next
    one: the buffers are converted between torch's and the classical form at the current learning rate, anything else
    raises.

    ``decoupled_weight_decay`` shrinks the parameter, :math:`p \leftarrow (1 - \gamma \lambda) p`, before the step,
    and leaves the gradient as it is (SGDW: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR
    2019).

    16-bit tensors are computed in fp32 and rounded once for each stored value. A momentum buffer is made with its
    parameter's dtype and layout; one that is found in another dtype or layout is used as it is.

    Args:
        params: tensors or dicts of parameter groups, of any shape and layout. fp32, fp64, bf16, fp16, complex64 and
            complex128 tensors on the CPU and on CUDA devices are fused, in one pass over all groups. Everything else
            that torch.optim.SGD can update (sparse gradients, other dtypes and devices, tensor subclasses
            with their own operators) takes torch's own path from the same step.
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
        formulation: ``"torch"``, ``"classical"`` or ``"ema"``, see above; the last two have no dampening
            (default: ``"torch"``).
        decoupled_weight_decay: decay the parameter instead of adding to the gradient (default: False).
        max_grad_norm: clip the 2-norm of all gradients together in each step, as :meth:`clip_grad_norm_` would; the
            norm is then in the attribute ``grad_norm`` (default: None).
        ema_decay: keep an exponential moving average of each parameter in its state, ``"ema"``, in the same pass: that
            of ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(ema_decay)``, updated after each
            step; see :meth:`ema_weights`. Where the layouts differ, and for parameters without a gradient, torch's
            lerp follows the step (default: None).
        ema_warmup: start with a smaller decay, ``(1 + n) / (10 + n)`` after n steps; for parameters on one CUDA device
            it counts them, so that a captured graph warms up too (default: False).
        momentum_dtype: dtype of the momentum buffers: float32, bfloat16, float16, int8 or float8_e4m3fn; None is
            torch's, the parameter's own. Those of 8 bits have one fp32 scale for each 256 elements
            (``"momentum_scale"`` in the state): block-wise quantization, Dettmers et al., ICLR 2022 (default: None).
        master_weights: keep the exact fp32 value of 16-bit parameters: for bf16 as 16 more bits
            (``"param_remainder"``), for fp16 as a copy (``"master_param"``) (default: False).
        stochastic_rounding: round what is stored in 16 or 8 bits up or down at random, with probabilities that make
            the mean right; parameters with a master are rounded to nearest (default: False).
        rounding_seed: of these random numbers, which depend on nothing else but the step, the parameter's place in
            ``param_groups`` and the element's in the parameter. Data-parallel replicas need the same. A step that
            found_inf on a CUDA device leaves out is counted too (default: 0).

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
        formulation: str = "torch",
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        momentum_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        check_decay(ema_decay, ema_warmup)
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self._own_defaults = {"formulation": formulation, "decoupled_weight_decay": decoupled_weight_decay}
        precision = (momentum_dtype, master_weights, stochastic_rounding, rounding_seed)
        # Groups have these keys only where they say something: each key costs every step a comparison.
        if precision != tuple(OPTIONS.values()):
            self._own_defaults.update(zip(OPTIONS, precision))
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
        self.defaults.update(self._own_defaults)
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self._start()

    def _start(self) -> None:
        """What is not part of the state."""
        self._plan = _C.StepPlan()
        counts = [group.get(ROUNDING_STEP, 0) for group in self.param_groups]
        self._plan.rounding_step = max([*counts, self.__dict__.pop("_steps_taken", 0)])
        self._grad_factor = GradFactor()
        self._is_swapped = False
        self._is_averaging = False
        self._traced = compiled.Traced(max((group.get(COUNT, 0) for group in self.param_groups), default=0))
        self._plan.adopt_formulations(self.param_groups)
        self._note_formulations()

    @property
    def grad_norm(self) -> Tensor | None:
        """What ``max_grad_norm`` has found in the last step: the norm of all gradients before clipping."""
        return self._traced.grad_norm

    @grad_norm.setter
    def grad_norm(self, norm: Tensor | None) -> None:
        self._traced.grad_norm = norm

    @property
    def _ema_count(self) -> UpdateCount:
        return self._traced.ema_count

    def _note_formulations(self) -> None:
        """How the state is stored, for a compiled step, which does not convert."""
        self._formulations = [compiled.stored_as(group) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: also for a formulation that the group's other hyperparameters do not go with, and for a
                momentum_dtype that is not supported.
        """
        num_groups = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, value in self._own_defaults.items():
            group.setdefault(name, value)
        if group.get("stochastic_rounding", False):
            group.setdefault(ROUNDING_STEP, 0)  # what flattens a checkpoint reads its keys from the live groups
        try:
            check_group(group)
            check_options(group)
        except (TypeError, ValueError):
            del self.param_groups[num_groups:]
            raise
        if "_plan" in self.__dict__:  # not while the optimizer is made
            self._plan.adopt_formulations([group])
            self._formulations = [*self._formulations, compiled.stored_as(group)]
        if num_groups and not self.param_groups[0].get(TRAIN_MODE, True):
            hold_iterate([group], self.state)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`, with the momentum buffers in their group's formulation."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of torch.optim.SGD has returned.

        The formulation stays that of this optimizer: momentum buffers of another one are converted where that is
        exact, at the loaded learning rate. So do momentum_dtype, master_weights, stochastic_rounding and its seed:
        what was stored in another way is converted in the next step. A group without momentum_dtype gets its buffers
        in the parameters' dtype, as from torch, but fp32 stays fp32 beside 16-bit parameters.

        Raises:
            ValueError: where it is not; the optimizer is then as it was.
        """
        self._check_not_swapped()
        before = dict(self.__dict__)
        groups = self.param_groups
        keep_dtypes(self, lambda: super(FusedMomentum, self).load_state_dict(state_dict))
        try:
            for group, old in zip(self.param_groups, groups):
                formulation = old.get("formulation", "torch")
                if group["formulation"] != formulation:
                    self._own_buffers(group)
                group["formulation"] = formulation
                group.setdefault("decoupled_weight_decay", old.get("decoupled_weight_decay", False))
                for name in OPTIONS:
                    group.pop(name, None)
                    if name in old:
                        group[name] = old[name]
                if group.get("stochastic_rounding", False):
                    group.setdefault(ROUNDING_STEP, 0)
                settle(group, self.state)
            self._plan.convert(self.param_groups, self.state)
        except BaseException:
            self.__dict__.update(before)
            raise
        self._note_formulations()
        self._grad_factor = before["_grad_factor"]  # the gradients are as they were

    def _own_buffers(self, group: dict[str, Any]) -> None:
        """Before buffers that were loaded are converted: torch may have taken the checkpoint's own tensors."""
        for param in group["params"]:
            entry = self.state.get(param, {})
            for name in ("momentum_buffer", "momentum_scale"):
                if isinstance(entry.get(name), Tensor):
                    entry[name] = entry[name].clone()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {
            **super().__getstate__(),
            "max_grad_norm": self.max_grad_norm,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "_steps_taken": self._plan.rounding_step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpack(state["state"])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("formulation", "torch")
        self._own_defaults = {
            "formulation": self.defaults.get("formulation", "torch"),
            "decoupled_weight_decay": self.defaults.get("decoupled_weight_decay", False),
            **{name: self.defaults[name] for name in OPTIONS if name in self.defaults},
        }
        for name, default in (("max_grad_norm", None), ("ema_decay", None), ("ema_warmup", False)):
            self.__dict__.setdefault(name, default)
        self._start()

    def eval(self) -> None:
        r"""Move parameters that are trained with Nesterov to the textbook's iterate, in one pass.

        With ``nesterov=True`` the gradient is taken at the look-ahead point, and that is where the model's parameters
        are between steps. The iterate is :math:`p + \gamma \mu b` (classical: :math:`p + \mu v`): evaluate and save the
        model there, then call :meth:`train`. Until then :meth:`step` raises. The iterates are the textbook's while lr
        and momentum are constant; with the classical formulation also under a learning rate schedule. Needs memory for
        one copy of the parameters. Has no effect on groups without Nesterov, or when called again.
        """
        self._settle()
        hold_iterate(self.param_groups, self.state)

    def train(self) -> None:
        """Undo :meth:`eval`: back to the very bits that the parameters had.

        Elements that were changed in between (a loaded model, say) move by the same distance instead.
        """
        self._check_not_swapped()
        hold_lookahead(self.param_groups, self.state)

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

        While ``torch.profiler`` is active, each step has a range ``FusedMomentum.step: N bytes``: N bytes must move, to
        read parameter, gradient and momentum buffer (which a tensor's first step does not read), write parameter and
        buffer, and read and write the average. It counts what the kernels update, not what is left to torch.

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
            run = FusedMomentum._step
        try:
            return run(self, *args, **kwargs)
        except BaseException:  # torch.amp.GradScaler would multiply what it finds here into its next scale
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    step.hooked = True  # type: ignore[attr-defined]  # torch's word for "already wrapped"

    def _is_wrapped_by_torch(self) -> bool:
        """True for a subclass's own step(), which torch has wrapped; not for a wrapper that someone put around ours."""
        inner = getattr(type(self).step, "__wrapped__", None)
        return inner is not None and not getattr(inner, "hooked", False)

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            self._check_not_swapped()
            check_train_mode(self.param_groups)  # before the closure writes gradients
            with torch.enable_grad():
                loss = closure()

        inv_grad_scale = 1.0
        differentiable = self.defaults["differentiable"]
        attributes = self.__dict__
        for_torch: Any = NotImplemented
        if "found_inf" in attributes or "grad_scale" in attributes:
            found_inf, grad_scale = attributes.get("found_inf"), attributes.get("grad_scale")
            # No need to wait for their values, if there are any.
            if found_inf is not grad_scale and _is_on_device(found_inf) and _is_on_device(grad_scale):
                for_torch = self._step_on_device(found_inf, grad_scale, differentiable)
            if for_torch is NotImplemented:
                if found_inf is not None and float(found_inf) != 0:
                    self._grad_factor.clear()
                    return loss
                inv_grad_scale = _reciprocal(grad_scale)
        if for_torch is NotImplemented and self.max_grad_norm is not None:
            before = self._grad_factor.snapshot()
            try:
                self.grad_norm = self._grad_factor.clip(
                    self.param_groups, self.max_grad_norm, inv_grad_scale=inv_grad_scale
                )
                self._update(inv_grad_scale, differentiable)
            except BaseException:
                self._grad_factor.restore(before)
                raise
        elif for_torch is NotImplemented:
            self._update(inv_grad_scale, differentiable)
        if self._grad_factor.is_active:
            self._grad_factor.clear()
        if self.ema_decay is not None:
            self._ema_count.add()
        return loss

    def _step_on_device(self, found_inf: Tensor | None, grad_scale: Tensor | None, differentiable: bool) -> Any:
        """A step whose numbers the host never learns; NotImplemented, and nothing has been written, where it must."""
        before = self._grad_factor.snapshot()
        done: Any = NotImplemented
        try:
            grad_norm = self.grad_norm
            if self.max_grad_norm is not None:
                grad_norm = self._grad_factor.clip_and_unscale(self.param_groups, self.max_grad_norm, grad_scale)
                grad_scale = None
            if self.max_grad_norm is None or grad_norm is not None:
                factor = self._grad_factor.current(self.param_groups) if self._grad_factor.is_active else 1.0
                if isinstance(factor, Tensor) and grad_scale is not None:
                    factor, grad_scale = self._grad_factor.take_scale(self.param_groups, grad_scale), None
                average = self._prepare_average(left_out_by_device=found_inf is not None)
                if found_inf is None or average is not None or not self._is_averaging:  # else the host must know
                    done = self._launch(found_inf, grad_scale, factor, average, differentiable)
        finally:
            if done is NotImplemented:
                self._grad_factor.restore(before)
        if done is not NotImplemented:
            self.grad_norm = grad_norm
        return done

    def _launch(
        self,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        factor: float | Tensor,
        average: tuple[Tensor, Tensor] | None,
        differentiable: bool,
    ) -> Any:
        if not (isinstance(factor, Tensor) or factor == 1.0):
            return NotImplemented
        done = self._plan.step_on_device(
            self.param_groups,
            self.state,
            differentiable,
            found_inf,
            grad_scale,
            factor if isinstance(factor, Tensor) else None,
            average,
            self.ema_decay or 0.0,
            self.ema_warmup,
        )
        if done is NotImplemented and average is not None:
            self._ema_count.bring_back()
        return done

    def _update(self, inv_grad_scale: float, differentiable: bool) -> None:
        """The compiled pass, and what only torch can update."""
        if self._grad_factor.is_active or self.ema_decay is not None or self._is_averaging:
            for_torch, inv_grad_scale = self._update_and_more(inv_grad_scale, differentiable)
        else:
            for_torch = self._plan.step(self.param_groups, self.state, inv_grad_scale, differentiable)
        if for_torch is not None:
            try:
                self._check_torch_step(for_torch)
                self._plan.begin_torch_step()
                self._torch_step(for_torch, inv_grad_scale, differentiable)
            except BaseException:
                self._plan.discard()
                raise
            self._plan.run()

    def _update_and_more(self, inv_grad_scale: float, differentiable: bool) -> tuple[Any, float]:
        """The same with a factor for the gradients, or averages; and what gradients were multiplied with."""
        factor = self._grad_factor.current(self.param_groups) if self._grad_factor.is_active else 1.0
        average = self._prepare_average()
        for_torch: Any = NotImplemented
        if inv_grad_scale == 1.0 and (average is not None or isinstance(factor, Tensor)):
            for_torch = self._launch(None, None, factor, average, differentiable)
        if for_torch is NotImplemented:
            if average is not None:  # the host must know
                self._ema_count.bring_back()
                self._prepare_average()
            inv_grad_scale *= float(factor)
            for_torch = self._plan.step(self.param_groups, self.state, inv_grad_scale, differentiable)
        return for_torch, inv_grad_scale

    def _prepare_average(self, left_out_by_device: bool = False) -> tuple[Tensor, Tensor] | None:
        """Tell the plan the averages' weight, if there are any; or where on the device it is worked out."""
        decay = self.ema_decay
        if decay is None and not self._is_averaging:
            return None
        self._check_not_swapped()
        self._is_averaging = decay is not None
        on_device = None
        weight = 0.0
        if decay is not None:
            on_device = self._ema_count.on_device(self._first_device(), left_out_by_device or self.ema_warmup)
            weight = 1.0 if on_device else average_weight(decay, self.ema_warmup, int(self._ema_count))
        self._plan.set_average_weight(weight)
        return on_device

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
        if self._is_swapped:
            raise RuntimeError("ema_weights() is active already")
        with swapped(self.state):
            self._is_swapped = True
            try:
                yield
            finally:
                self._is_swapped = False

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.SGD.load_state_dict takes it: momentum buffers, in its formulation.

        Buffers of 8 bits are decoded to fp32, others keep their dtype (torch casts them as it loads). What torch has
        no place for is left out: averages, and masters, whose parameters are in the model, rounded. The exponential
        moving average of gradients becomes ``dampening = momentum``.

        Buffers that need no change are this optimizer's own tensors, as in :meth:`state_dict`: copy or save them before
        both optimizers go on.

        Raises:
            ValueError: for what torch.optim.SGD cannot do: decoupled weight decay, Nesterov in the ema formulation.
            RuntimeError: while :meth:`eval` holds the iterate.
        """
        return as_torch_state_dict(self.state_dict())

    def memory_summary(self) -> MemorySummary:
        """Bytes of parameters, gradients and state by kind, with today's options; prints as a table.

        Counts what a step with all gradients will have allocated, so it is the same before the first step and after.
        """
        return summarize(self.param_groups, self.state, self.ema_decay is not None)

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
    ) -> Tensor:
        """Clip the norm of all gradients together, in the next :meth:`step`.

        Takes the place of ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)``. The norm is computed now,
        in one pass that only reads; the step multiplies with the coefficient while it reads the gradients anyway, so
        ``param.grad`` keeps its values. Norms 1, 2 and inf of gradients that are all on the CPU, or all dense on one
        CUDA device, are computed in double, with the same bits on every run; for all else torch's own functions are
        called, which write to the gradients. On a CUDA device nothing waits: norm and coefficient stay there, and both
        can be captured into a graph, max_norm as the number that it is then.

        Called again, it clips what the first call has left, as torch's function does. Gradients that have all been
        replaced before the step (``p.grad = p.grad + noise`` too) are not clipped, and what is written to them through
        ``p.grad.data`` goes unseen. If only some were, or if they were written to (another backward),
        :meth:`step` raises: clip after the last backward. A step without gradients, or one that is left out for an
        overflow, uses the coefficient up.

        Args:
            max_norm: what the norm shall not exceed.
            norm_type: the p of the p-norm, may be ``inf``.
            foreach: accepted as torch's function does; has no effect.
            error_if_nonfinite: raise if the norm is inf or NaN, instead of multiplying with what comes out; waits for
                a CUDA device.

        Returns:
            The norm before clipping, a tensor of no dimension in the gradients' dtype, on their device.

        Raises:
            RuntimeError: for a norm that is not finite, if asked for; for gradients that were written to after the
                last clipping.
        """
        if is_dynamo_compiling():
            return compiled.clip_grad_norm_(self, max_norm, norm_type, error_if_nonfinite)
        return self._grad_factor.clip(self.param_groups, float(max_norm), float(norm_type), error_if_nonfinite)

    def _check_not_swapped(self) -> None:
        if self._is_swapped:
            raise RuntimeError("parameters and averages have changed places; leave ema_weights() first")

    def _settle(self) -> None:
        """Before the state leaves: buffers in their group's formulation, and none that was never computed."""
        self._check_not_swapped()
        count = int(self._ema_count)
        for group in self.param_groups if count else ():
            group[COUNT] = count  # in every group: any of them may go
        for group in self.param_groups:
            if group.get("stochastic_rounding", False) or ROUNDING_STEP in group:  # it may be turned on again
                group[ROUNDING_STEP] = self._plan.rounding_step
        self._plan.convert(self.param_groups, self.state)
        unstarted = self._plan.unstarted_buffers()  # their first step overflowed on the GPU
        for param, state in list(self.state.items()) if unstarted else []:
            if any(state.get("momentum_buffer") is buffer for buffer in unstarted):
                del state["momentum_buffer"]
                state.pop("momentum_scale", None)
                if not state:
                    del self.state[param]

    def _torch_step(self, positions: Iterable[tuple[int, int]], inv_grad_scale: float, differentiable: bool) -> None:
        """Torch's own update of the tensors at these (group, index in group)."""
        with torch.set_grad_enabled(differentiable):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                grad = param.grad if inv_grad_scale == 1.0 else param.grad * inv_grad_scale
                if needs_low_precision_step(group, self.state.get(param, {})):
                    low_precision_step(group, param, grad, self.state[param], torch_step)
                    continue
                has_momentum = group["momentum"] != 0
                buffer = self.state[param].get("momentum_buffer") if has_momentum else None
                buffer = torch_step(group, param, grad, buffer)
                if has_momentum:
                    self.state[param]["momentum_buffer"] = buffer

    def _check_torch_step(self, positions: Iterable[tuple[int, int]]) -> None:
        """Let torch raise on one-element stand-ins what it would raise for these tensors, while nothing is written."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                if param.is_cuda and not _C.HAS_CUDA_KERNELS:
                    _warn_of_missing_kernels()
                buffer = self.state[param].get("momentum_buffer") if param in self.state else None
                if needs_low_precision_step(group, self.state.get(param, {})):
                    name = f"param_groups[{g}]['params'][{i}]"
                    check_low_precision_step(group, param, self.defaults["differentiable"], name)
                    if isinstance(buffer, Tensor) and buffer.dtype in EIGHT_BITS:
                        buffer = param.detach()  # torch gets a value of its parameter's kind
                check_torch_step(group, param, param.grad, buffer)


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


def _reciprocal(grad_scale: Tensor | float | None) -> float:
    """1 / grad_scale, rounded to fp32 as GradScaler.unscale_ rounds it."""
    if grad_scale is None:
        return 1.0
    return torch.tensor(1.0 / float(grad_scale), dtype=torch.float32).item()


# torch's wrapper: a profiler range, the hooks, and the mark that its Python tracer looks for.
_observed_step = Optimizer.profile_hook_step(FusedMomentum._step)
# Hooks see the arguments as they were given, hence step's *args; people and tools see what it takes.
FusedMomentum.step.__signature__ = inspect.signature(FusedMomentum._step)  # type: ignore[attr-defined]
