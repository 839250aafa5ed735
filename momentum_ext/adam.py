"""FusedAdam and FusedAdamW: torch.optim.Adam and AdamW in one pass over memory."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT, _get_scalar_dtype

from momentum_ext.checkpoint import as_torch_state_dict
from momentum_ext.fused import FusedOptimizer
from momentum_ext.keys import OPTIONS
from momentum_ext.rule_operator import RULES, TracedRule

__all__ = ["FusedAdam", "FusedAdamW", "StateDtype"]

StateDtype = torch.dtype | str | dict[str, torch.dtype | str | None] | None

_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _states_of(group: dict[str, Any]) -> tuple[str, ...]:
    return _STATES if group["amsgrad"] else _STATES[:2]


def _update_by_torch(group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
    """Of one tensor, which on a first step has no state."""
    if grad.is_sparse:
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
    states = _states_of(group)
    if states[0] not in state:
        device = param.device if group["capturable"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=_get_scalar_dtype(), device=device)
        for key in states:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    adam(
        [param],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
        [state["step"]],
        foreach=False,
        fused=False,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        has_complex=param.is_complex(),
        amsgrad=group["amsgrad"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )


RULES["adam"] = TracedRule(
    ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    _states_of,
    {"step": 0.0},
    _update_by_torch,
)


class FusedAdam(FusedOptimizer, Adam):
    r"""Adam that updates a whole list of tensors in one pass.

    Takes the place of :class:`torch.optim.Adam`: the same arguments, the same ``param_groups`` and state (``"step"``,
    ``"exp_avg"``, ``"exp_avg_sq"``, with ``amsgrad`` ``"max_exp_avg_sq"``), state dicts that load into either, and in
    fp32 and fp64 the same bits as ``Adam(foreach=False, fused=False)`` with correctly rounded square roots. For each
    element, with :math:`g` the gradient (negated if ``maximize``), :math:`p` the parameter, :math:`t` the step of its
    tensor:

    .. math::
        g &\leftarrow g + \lambda p                        &&\text{weight\_decay } \lambda;
                                                               \text{ decoupled: } p \leftarrow p - \gamma \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g          &&\text{exp\_avg} \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2        &&\text{exp\_avg\_sq} \\
        w &\leftarrow \max(w, v)                           &&\text{with amsgrad; else } w = v \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t} \cdot \frac{m}{\sqrt{w / (1 - \beta_2^t)} + \epsilon}

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (ICLR 2015); amsgrad: Reddi, Kale and Kumar, "On the
    Convergence of Adam and Beyond" (ICLR 2018); decoupled decay: Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization" (ICLR 2019).

    16-bit tensors are computed in fp32 and rounded once for each stored value.

    Args:
        params: tensors or dicts of parameter groups, as :class:`momentum_ext.FusedMomentum` takes them.
        lr: learning rate, a float or a tensor of one element (default: 1e-3).
        betas: factors of the two averages (default: (0.9, 0.999)); as tensors they take torch's path.
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty (default: 0).
        amsgrad: divide by the largest ``exp_avg_sq`` so far (default: False).
        foreach: accepted for compatibility with torch; has no effect.
        maximize: maximize the objective instead of minimizing (default: False).
        capturable: count steps on the device, for CUDA graphs. torch computes otherwise then (it divides by the step
            size); ours keeps its formula and is within a few ulps of torch's. On the CPU it takes torch's path
            (default: False).
        differentiable: step through autograd; takes torch's path (default: False).
        fused: True lets torch.amp.GradScaler hand over its scale, as in torch, so that the step unscales; without it
            the scaler unscales the gradients and leaves steps out. On CUDA devices steps are counted there, as with
            torch's. The step is the same.
        decoupled_weight_decay: decay the parameter instead of adding to the gradient: AdamW (default: False).
        state_dtype: dtype of the states: float32, bfloat16 or int8, as a torch.dtype or its name (which groups and
            checkpoints hold), or a dict of them by key; ``"exp_avg"`` may also be float16, float8_e4m3fn or int4, in
            which a small second moment would be 0 and its step wild. None is torch's, the parameter's own, and float32
            beside a master (default: None).
        stochastic_rounding: as in :class:`momentum_ext.FusedMomentum`. None also rounds at random where
            ``state_dtype`` keeps second moments in 16 or 8 bits: they fall by a thousandth in a step, and rounded to
            nearest never (default: None).
        max_grad_norm, process_group, ema_decay, ema_warmup, master_weights, rounding_seed,
            compact_state_dict: as in :class:`momentum_ext.FusedMomentum`.

    Raises:
        ValueError, TypeError, RuntimeError: where torch.optim.Adam raises them, and from :meth:`step` for a tensor that
            cannot be updated, with its position in ``param_groups``; nothing has been written then.

    Example::

        optimizer = momentum_ext.FusedAdam(model.parameters(), lr=1e-3)
        optimizer.zero_grad()
        loss_fn(model(input), target).backward()
        optimizer.step()
    """

    _rule = "adam"
    _options = OPTIONS
    _counters = ("step",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        process_group: Any = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        state_dtype: StateDtype = None,
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
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )
        Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._keep_defaults()

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer takes it: values in place of 8-bit codes, without averages and masters.

        States that need no change are this optimizer's own tensors, as in :meth:`state_dict`: copy or save them before
        both optimizers go on.

        Raises:
            RuntimeError: inside :meth:`ema_weights`.
        """
        return as_torch_state_dict(self.state_dict(), self._options)

    _states_of = staticmethod(_states_of)
    _update_by_torch = staticmethod(_update_by_torch)


class FusedAdamW(FusedAdam, AdamW):
    """AdamW that updates a whole list of tensors in one pass: :class:`FusedAdam` with decoupled weight decay.

    Takes the place of :class:`torch.optim.AdamW`, with its arguments and its default ``weight_decay`` of 1e-2; for all
    others see :class:`FusedAdam`.

    Example::

        optimizer = momentum_ext.FusedAdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        if "decoupled_weight_decay" in options:
            raise TypeError("FusedAdamW has decoupled weight decay; use FusedAdam for a choice")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)


def _signature() -> inspect.Signature:
    """FusedAdam's, with another default and without the choice."""
    signature = inspect.signature(FusedAdam.__init__)
    named = {"weight_decay": 1e-2}
    params = [each.replace(default=named.get(name, each.default)) for name, each in signature.parameters.items()]
    return signature.replace(parameters=[each for each in params if each.name != "decoupled_weight_decay"])


FusedAdamW.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
