"""FusedMomentum: torch.optim.SGD's momentum and Nesterov in one pass over memory."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
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
from momentum_ext.averaging import COUNT, HeldWeights, UpdateCount, average_weight, check_decay, swapped
from momentum_ext.checkpoint import (
    OWN_DEFAULTS,
    as_torch_state_dict,
    changed,
    check_complete,
    keep_dtypes,
    unpack,
    with_changes,
    without_defaults,
)
from momentum_ext.clipping import GradFactor, StandIns
from momentum_ext.formulation import check_group, check_torch_step, torch_step
from momentum_ext.lookahead import iterates, restore_lookahead
from momentum_ext.memory import MemorySummary, summarize
from momentum_ext.precision import (
    BUFFER,
    EIGHT_BITS,
    ROUNDING_STEP,
    SCALE,
    check_low_precision_step,
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
    initialization and momentum in deep learning" (ICML 2013), seen from the look-ahead point (see
    :meth:`iterate_weights`).

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
    one with momentum: the buffers, whose form is in the group's ``"buffer_formulation"``, are converted between torch's
    and the classical form at the learning rate of that step, anything else raises.

    ``decoupled_weight_decay`` shrinks the parameter, :math:`p \leftarrow (1 - \gamma \lambda) p`, before the step,
    and leaves the gradient as it is (SGDW: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR
    2019).

    16-bit tensors are computed in fp32 and rounded once for each stored value. A momentum buffer is made with its
    parameter's dtype and layout; one that is found in another dtype is converted, one in another layout used as it is.

    A group has keys of ours only where it uses these options, and ``state_dict()`` of an optimizer that uses none has
    SGD's keys alone. A step with lr 0 in every group is no training: it makes the state and leaves averages, counts and
    ``grad_norm`` alone (``torch.distributed.checkpoint`` makes a fresh optimizer's state by such a step).

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
        fused: True lets torch.amp.GradScaler hand over its scale, as in torch, so that the step unscales; without it
            the scaler unscales the gradients and leaves steps out. The step is the same.
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
        momentum_dtype: dtype of the momentum buffers: float32, bfloat16, float16, int8 or float8_e4m3fn, as a
            torch.dtype or its name (which groups and checkpoints hold); None is torch's, the parameter's own, and
            float32 beside a master. Those of 8 bits have one fp32 scale for each 256 elements
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
        momentum_dtype: torch.dtype | str | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        check_decay(ema_decay, ema_warmup)
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        # Groups have a key only where it says something: others load into torch's SGD, and cost no comparison.
        self._own_defaults = {
            "formulation": formulation,
            "decoupled_weight_decay": decoupled_weight_decay,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
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
        self._own_defaults = {key: value for key, value in self._own_defaults.items() if value != OWN_DEFAULTS[key]}
        self.defaults.update(self._own_defaults)
        self._start()

    def _start(self) -> None:
        """What is not part of the state."""
        self._plan = _C.StepPlan()
        counts = [group.get(ROUNDING_STEP, 0) for group in self.param_groups]
        self._plan.rounding_step = max([*counts, self.__dict__.pop("_steps_taken", 0)])
        self._traced = compiled.Traced(max((group.get(COUNT, 0) for group in self.param_groups), default=0))
        # These outlive a loaded state: wrappers share the one, the gradients of the other are as they were.
        self.__dict__.setdefault("_held_weights", HeldWeights())
        self.__dict__.setdefault("_grad_factor", GradFactor())
        if self.defaults.get("fused"):  # torch sets it when the optimizer is made, and a copy forgets it
            self._step_supports_amp_scaling = True

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
        try:
            check_group(group)
            without_defaults(group)
        except (TypeError, ValueError):
            del self.param_groups[num_groups:]
            raise
        self._add_own_keys(group)

    def _add_own_keys(self, group: dict[str, Any]) -> None:
        """Keys beside the options that are used: what flattens a checkpoint reads its keys from the live groups."""
        if "formulation" in group:
            group.setdefault("buffer_formulation", group["formulation"])
        if group.get("stochastic_rounding", False):
            group.setdefault(ROUNDING_STEP, 0)
        if self.ema_decay is not None:
            group.setdefault(COUNT, 0)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`, with the state that the next step would start from.

        What was edited in ``param_groups`` and is to be converted is converted here, in a copy. Tensors leave in dtypes
        that every backend moves: an int16 remainder as bfloat16, an fp8 buffer as uint8, both with the same bits.

        Raises:
            RuntimeError: inside :meth:`ema_weights` and :meth:`iterate_weights`.
        """
        self._held_weights.check()
        self._update_counts()
        handle = self.register_state_dict_post_hook(FusedMomentum._finish_state_dict, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _finish_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        changes, converted = self._plan.pending_changes(self.param_groups, self.state)
        names: dict[int, Any] = {}
        for g, (group, packed) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            names.update(zip(map(id, group["params"]), packed["params"], strict=True))
            without_defaults(packed)
            if "stochastic_rounding" not in packed:
                packed.pop(ROUNDING_STEP, None)
            if g in converted:
                packed.pop("buffer_formulation", None)
                if "formulation" in packed:
                    packed["buffer_formulation"] = packed["formulation"]
        return with_changes(state_dict, changes + self._unstarted(), names)

    def _unstarted(self) -> list[tuple[Tensor, str, None]]:
        """Momentum that was never computed, because its first step overflowed on the GPU."""
        buffers = {id(buffer) for buffer in self._plan.unstarted_buffers()}
        if not buffers:
            return []
        params = [param for param, entry in self.state.items() if id(entry.get(BUFFER)) in buffers]
        return [(param, key, None) for param in params for key in (BUFFER, SCALE)]

    def _update_counts(self) -> None:
        """What counts outside of the groups goes into them."""
        count = int(self._ema_count)
        for group in self.param_groups:
            if self.ema_decay is not None or count:
                group[COUNT] = count  # in every group: any of them may go
            if group.get("stochastic_rounding", False):
                group[ROUNDING_STEP] = self._plan.rounding_step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of torch.optim.SGD has returned.

        The options of this optimizer stay: formulation, momentum_dtype, master_weights, stochastic_rounding and its
        seed. State keeps the dtype and the formulation that it was saved in, and the next step converts it where that
        is exact, at the loaded learning rate. ``decoupled_weight_decay`` is loaded where it was saved. What 0.1.0 had
        saved after ``eval()`` is moved back to the look-ahead point: load the model first.

        Raises:
            ValueError: for state that is not whole, by its name, and for a formulation that cannot be converted; the
                optimizer is then as it was.
        """
        self._held_weights.check()
        before = dict(self.__dict__)
        old_groups = self.param_groups
        keep_dtypes(self, lambda: super(FusedMomentum, self).load_state_dict(state_dict))
        try:
            check_complete(self.param_groups, self.state)
            for group, old in zip(self.param_groups, old_groups, strict=True):
                stored = group.pop("buffer_formulation", group.get("formulation", "torch"))
                decoupled = group.get("decoupled_weight_decay", old.get("decoupled_weight_decay", False))
                for name in OWN_DEFAULTS:
                    group.pop(name, None)
                    if name in old:
                        group[name] = old[name]
                group["decoupled_weight_decay"] = decoupled
                without_defaults(group)
                if stored != "torch" or "formulation" in group:
                    group["buffer_formulation"] = stored
                if "stochastic_rounding" not in group:
                    group.pop(ROUNDING_STEP, None)
                self._add_own_keys(group)
            self._plan.pending_changes(self.param_groups, self.state)  # raises what the next step would
            restore_lookahead(self.param_groups, self.state)
        except BaseException:
            self.__dict__.update(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._held_weights.check()
        self._update_counts()
        state = super().__getstate__()
        moved, _ = self._plan.pending_changes(self.param_groups, self.state, moved_only=True)
        if changes := moved + self._unstarted():
            state["state"] = changed(state["state"], changes, {id(param): param for param in self.state})
        return {
            **state,
            "max_grad_norm": self.max_grad_norm,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "_steps_taken": self._plan.rounding_step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpack(state["state"])
        super().__setstate__(state)
        self._own_defaults = {name: self.defaults[name] for name in OWN_DEFAULTS if name in self.defaults}
        for name, default in (("max_grad_norm", None), ("ema_decay", None), ("ema_warmup", False)):
            self.__dict__.setdefault(name, default)
        self._start()

    @contextmanager
    def iterate_weights(self) -> Iterator[None]:
        r"""Within the context, parameters that are trained with Nesterov are the textbook's iterates.

        With ``nesterov=True`` the gradient is taken at the look-ahead point, and that is where the model's parameters
        are between steps. The iterate is :math:`p + \gamma \mu b` (classical: :math:`p + \mu v`): evaluate and save the
        model there. On leaving, the parameters get the very bits that they had; elements that were changed inside (a
        loaded model, say) move by the same distance instead. One pass in, one out, and memory for one copy of the
        parameters. The iterates are the textbook's while lr and momentum are constant; with the classical formulation
        also under a learning rate schedule. Groups without Nesterov stay as they are.

        :meth:`step` and :meth:`state_dict` raise inside: an optimizer's checkpoint belongs to the look-ahead point.
        Save the model inside and the optimizer outside, or both outside to go on training.

        Example::

            with optimizer.iterate_weights():
                evaluate(model)
        """
        with self._held_weights.hold("iterate_weights"):
            moved, _ = self._plan.pending_changes(self.param_groups, self.state, moved_only=True)
            state = changed(self.state, moved, {id(param): param for param in self.state})
            with iterates(self.param_groups, state):
                yield

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
            for_torch = self._plan.step(self.param_groups, self.state, 1.0, self.defaults["differentiable"])
            if for_torch is not None:
                self._step_by_torch(for_torch, 1.0, None)
        else:
            self._step_and_more(attributes.get("found_inf"), attributes.get("grad_scale"))
        return loss

    def _step_and_more(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """The step with what a GradScaler hands over, clipping and averages."""
        # A step with lr 0 makes state, and is otherwise no step: see the class.
        trains = any(_is_nonzero(group["lr"]) for group in self.param_groups)
        done, norm = False, None
        if found_inf is not grad_scale and _is_on_device(found_inf) and _is_on_device(grad_scale):
            done, norm = self._step_on_device(found_inf, grad_scale, trains)
        if not done:
            if found_inf is not None and float(found_inf) != 0:
                self._grad_factor.clear()
                return
            inv_grad_scale = 1.0 if grad_scale is None else _C.inverse_scale(float(grad_scale))
            factor, grads, norm = self._grad_factor.in_step(self.param_groups, self.max_grad_norm, inv_grad_scale)
            if inv_grad_scale != 1.0 or not self._launch(None, None, factor, grads, trains):
                self._step_on_host(inv_grad_scale * float(factor), grads, trains)
        if trains and self.max_grad_norm is not None:
            self.grad_norm = norm
        if self._grad_factor.is_active:
            self._grad_factor.end_step(self.param_groups)
        if trains and self.ema_decay is not None:
            self._ema_count.add()

    def _step_on_host(self, inv_grad_scale: float, grads: StandIns | None, trains: bool) -> None:
        weight = None
        if self.ema_decay is not None:
            if self._ema_count.is_on_device:
                self._ema_count.bring_back()
            weight = average_weight(self.ema_decay, self.ema_warmup, int(self._ema_count)) if trains else 0.0
        for_torch = self._plan.step_with(
            self.param_groups, self.state, inv_grad_scale, self.defaults["differentiable"], weight, grads
        )
        if for_torch is not None:
            self._step_by_torch(for_torch, inv_grad_scale, grads)

    def _step_on_device(
        self, found_inf: Tensor | None, grad_scale: Tensor | None, trains: bool
    ) -> tuple[bool, Tensor | None]:
        """A step whose numbers the host never learns; False, and nothing has been written, where it must."""
        in_step = self._grad_factor.in_step_on_device(self.param_groups, self.max_grad_norm, grad_scale)
        if in_step is None:
            return False, None
        factor, grads, norm = in_step
        if isinstance(factor, Tensor):
            grad_scale = None  # it is in the factor
        return self._launch(found_inf, grad_scale, factor, grads, trains), norm

    def _launch(
        self,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        factor: float | Tensor,
        grads: StandIns | None,
        trains: bool,
    ) -> bool:
        """The step, where all numbers that only a device knows stay there; False where the host must know them."""
        average = None
        weight: float | None = None
        if self.ema_decay is not None:
            left_out_by_device = found_inf is not None
            if trains:
                average = self._ema_count.on_device(self._first_device(), left_out_by_device or self.ema_warmup)
                if average is None and left_out_by_device:
                    return False
            weight = 1.0 if average else average_weight(self.ema_decay, self.ema_warmup, int(self._ema_count))
            weight = weight if trains else 0.0
        on_device = factor if isinstance(factor, Tensor) else None
        if (on_device is None and factor != 1.0) or found_inf is grad_scale is on_device is average:
            return False
        done = self._plan.step_with(
            self.param_groups,
            self.state,
            1.0,
            self.defaults["differentiable"],
            weight,
            grads,
            found_inf,
            grad_scale,
            on_device,
            average,
            self.ema_decay or 0.0,
            self.ema_warmup,
        )
        return done is not NotImplemented

    def _step_by_torch(self, positions: list[tuple[int, int]], inv_grad_scale: float, grads: StandIns | None) -> None:
        """The second half of a prepared step: what only torch can update, and then the rest."""
        try:
            self._check_torch_step(positions)
            self._plan.begin_torch_step()
            self._torch_step(positions, inv_grad_scale, grads or {})
        except BaseException:
            self._plan.discard()
            raise
        self._plan.run()

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

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.SGD.load_state_dict takes it: momentum buffers, in its formulation.

        Buffers of 8 bits are decoded to fp32, others keep their dtype (torch casts them as it loads). What torch has
        no place for is left out: averages, and masters, whose parameters are in the model, rounded. The exponential
        moving average of gradients becomes ``dampening = momentum``.

        Buffers that need no change are this optimizer's own tensors, as in :meth:`state_dict`: copy or save them before
        both optimizers go on.

        Raises:
            ValueError: for what torch.optim.SGD cannot do: decoupled weight decay, Nesterov in the ema formulation.
            RuntimeError: inside :meth:`ema_weights` and :meth:`iterate_weights`.
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

        The coefficient belongs to the memory of these gradients, as if it had been written there. Called again, it
        clips what the first call has left. A gradient that is replaced before the step by one in other memory is not
        clipped, the others are; what is written to them through ``p.grad.data`` goes unseen. :meth:`zero_grad`, the
        step that uses it and a step that a ``momentum_ext.GradScaler`` leaves out end it; a step that raises does not.
        Gradients that are written to before the step (another backward) make it raise: clip last. After an overflow,
        whose norm is not finite, they are simply not clipped.

        Args:
            max_norm: what the norm shall not exceed.
            norm_type: the p of the p-norm, may be ``inf``.
            foreach: accepted as torch's function does; has no effect.
            error_if_nonfinite: raise if the norm is inf or NaN, instead of multiplying with what comes out; waits for
                a CUDA device.

        Returns:
            The norm before clipping, a tensor of no dimension in the gradients' dtype, on their device.

        Raises:
            RuntimeError: for a norm that is not finite, if asked for; for a gradient that was written to after the
                last clipping, with its place in ``param_groups``.
        """
        if is_dynamo_compiling():
            return compiled.clip_grad_norm_(self, max_norm, norm_type, error_if_nonfinite)
        return self._grad_factor.clip(self.param_groups, float(max_norm), float(norm_type), error_if_nonfinite)

    def _torch_step(self, positions: list[tuple[int, int]], inv_grad_scale: float, grads: StandIns) -> None:
        """Torch's own update of the tensors at these (group, index in group)."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for g, i in positions:
                group = self.param_groups[g]
                param = group["params"][i]
                grad = grads.get(param, param.grad)
                grad = grad if inv_grad_scale == 1.0 else grad * inv_grad_scale
                if needs_low_precision_step(group, self.state.get(param, {})):
                    low_precision_step(group, param, grad, self.state[param], torch_step)
                    continue
                has_momentum = group["momentum"] != 0
                buffer = self.state[param].get("momentum_buffer") if has_momentum else None
                buffer = torch_step(group, param, grad, buffer)
                if has_momentum:
                    self.state[param]["momentum_buffer"] = buffer

    def _check_torch_step(self, positions: list[tuple[int, int]]) -> None:
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


def _is_nonzero(lr: Any) -> bool:
    """False for an lr of 0, without waiting for a device."""
    return lr.is_cuda or bool(lr != 0) if isinstance(lr, Tensor) else lr != 0


# torch's wrapper: a profiler range, the hooks, and the mark that its Python tracer looks for.
_observed_step = Optimizer.profile_hook_step(FusedMomentum._step)
# Hooks see the arguments as they were given, hence step's *args; people and tools see what it takes.
FusedMomentum.step.__signature__ = inspect.signature(FusedMomentum._step)  # type: ignore[attr-defined]
