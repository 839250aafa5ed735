"""FusedMomentum: torch.optim.SGD's momentum and Nesterov in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from momentum_ext.checkpoint import as_momentum_state_dict, changed
from momentum_ext.formulation import update_by_torch
from momentum_ext.fused import FusedOptimizer
from momentum_ext.keys import BUFFER, MOMENTUM_OPTIONS
from momentum_ext.lookahead import iterates
from momentum_ext.update_report import UpdateReport, report

__all__ = ["FusedMomentum"]


class FusedMomentum(FusedOptimizer, SGD):
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
        foreach: accepted for compatibility with torch.optim.SGD; has no effect.
        differentiable: step through autograd; takes torch's path (default: False).
        fused: True lets torch.amp.GradScaler hand over its scale, as in torch, so that the step unscales; without it
            the scaler unscales the gradients and leaves steps out. The step is the same.
        formulation: ``"torch"``, ``"classical"`` or ``"ema"``, see above; the last two have no dampening
            (default: ``"torch"``).
        decoupled_weight_decay: decay the parameter instead of adding to the gradient (default: False).
        max_grad_norm: clip the 2-norm of all gradients together in each step, as :meth:`clip_grad_norm_` would; the
            norm is then in the attribute ``grad_norm`` (default: None).
        process_group: the ranks that hold other parameters of the same model, as in pipeline and expert parallelism.
            Norms and inf checks go over them too, besides the mesh of DTensors. A copy of the optimizer has none
            (default: None).
        ema_decay: keep an exponential moving average of each parameter in its state, ``"ema"``, in the same pass: that
            of ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(ema_decay)``, updated after each
            step; see :meth:`ema_weights`. Where the layouts differ, and for parameters without a gradient, torch's
            lerp follows the step (default: None).
        ema_warmup: start with a smaller decay, ``(1 + n) / (10 + n)`` after n steps; for parameters on one CUDA device
            it counts them, so that a captured graph warms up too (default: False).
        momentum_dtype: dtype of the momentum buffers: float32, bfloat16, float16, int8, float8_e4m3fn or int4, as a
            torch.dtype or its name (which groups and checkpoints hold); None is torch's, the parameter's own, and
            float32 beside a master. Those of 8 and 4 bits have one scale of two bytes for each 32 elements
            (``"momentum_scale"`` in the state): block-wise quantization, Dettmers et al., ICLR 2022. int4 is stored
            as uint8, two elements in a byte; as int8 where a parameter is transposed and the dimension that is
            innermost in its memory is odd (default: None).
        state_dtype: the same as ``momentum_dtype``, as all our optimizers have it: also a dict by the state's key,
            ``{"momentum_buffer": "int8"}`` (default: None).
        master_weights: keep the exact fp32 value of 16-bit parameters: for bf16 as 16 more bits
            (``"param_remainder"``), for fp16 as a copy (``"master_param"``). 24 keeps 8 more bits of bf16 parameters:
            a value of 24 bits (default: False; True is 32).
        stochastic_rounding: round what is stored in 16 bits or fewer up or down at random, with probabilities that make
            the mean right; parameters with a master are rounded to nearest from it. None rounds only masters of 24 bits
            so, which would stall otherwise; False rounds nothing so (default: None).
        rounding_seed: of these random numbers, which depend on nothing else but the step, the parameter's place in
            ``param_groups`` and the element's in the parameter. Data-parallel replicas need the same. A step left
            out because of found_inf on a CUDA device counts too (default: 0).
        compact_state_dict: ``state_dict()`` has momentum of 8 and 4 bits in so many bits, where its blocks are parts of
            rows that no sharding cuts. False: its fp32 values, from which any sharding can be made (default: True).

    Raises:
        ValueError, TypeError, RuntimeError: where torch.optim.SGD raises them, and from :meth:`step` for a tensor that
            cannot be updated, with its position in ``param_groups``; nothing has been written then.

    Example::

        optimizer = momentum_ext.FusedMomentum(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.zero_grad()
        loss_fn(model(input), target).backward()
        optimizer.step()
    """

    _rule = "sgd"
    _options = MOMENTUM_OPTIONS

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
        process_group: Any = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | dict[str, torch.dtype | str | None] | None = None,
        master_weights: bool | int = False,
        stochastic_rounding: bool | None = None,
        rounding_seed: int = 0,
        compact_state_dict: bool = True,
    ) -> None:
        self._take_options(
            max_grad_norm,
            process_group,
            ema_decay,
            ema_warmup,
            compact_state_dict,
            formulation=formulation,
            decoupled_weight_decay=decoupled_weight_decay,
            momentum_dtype=momentum_dtype,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )
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
        self._keep_defaults()

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
            state = changed(self.state, self._moved(), {id(param): param for param in self.state})
            with iterates(self.param_groups, state):
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
        return as_momentum_state_dict(self.state_dict())

    def update_report(self) -> UpdateReport:
        """How many of the last step's updates were below the resolution of what their parameters are stored in.

        An update is what a step subtracts from an element: the learning rate times the direction (the momentum buffer;
        with Nesterov also the gradient), and decoupled weight decay. It is below the resolution where it is not zero
        and the element (with its master, if it has one) would be stored as it was, rounded to nearest: where it is
        smaller than half a unit in the last place. Weights that stall so do not train; a master, or
        ``stochastic_rounding``, is what helps.

        The step keeps no copy of what was there before, so this takes the same update once more, from where the
        parameter is now, in registers: by the same rule, from the momentum buffer and the gradient that the step has
        left and with the learning rate that the group has now. Where the last step left an element as it was, that is
        what it did. One pass that reads, for each parameter that has momentum, whenever its last update was. Call it
        before the gradients change. What they were multiplied with in an eager step (clipping, a GradScaler's scale)
        is remembered.

        Counted are dense tensors that the kernels update; DTensors by their local shards, on each rank its own, where
        what is needed of their gradients lies as they do; real and imaginary parts of complex elements by themselves. A
        step that a CUDA device has left out for an overflow counts as if it had been taken. Waits for CUDA devices.

        Returns:
            A list with a row for each group and storage, see :class:`momentum_ext.update_report.StoredUpdates`; prints
            as a table.

        Raises:
            RuntimeError: where there is nothing to count: before the first step, also after state was loaded, and for
                Nesterov or without momentum when the gradients are gone. For an edit since that does not go with it.
                Inside :meth:`ema_weights` and :meth:`iterate_weights`.
        """
        self._held_weights.check()
        return report(self._plan, self.param_groups, self.state)

    @staticmethod
    def _states_of(group: dict[str, Any]) -> tuple[str, ...]:
        momentum = group["momentum"]
        return (BUFFER,) if isinstance(momentum, Tensor) or momentum != 0 else ()

    _update_by_torch = staticmethod(update_by_torch)
