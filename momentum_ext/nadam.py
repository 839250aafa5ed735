"""FusedNAdam: torch.optim.NAdam in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import NAdam
from torch.optim.nadam import nadam
from torch.optim.optimizer import ParamsT, _get_scalar_dtype

from momentum_ext.adam import StateDtype
from momentum_ext.checkpoint import as_torch_state_dict
from momentum_ext.fused import FusedOptimizer
from momentum_ext.keys import OPTIONS
from momentum_ext.rule_operator import RULES, TracedRule

__all__ = ["FusedNAdam"]


def _states_of(group: dict[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def _update_by_torch(group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
    """Of one tensor, which on a first step has no state."""
    if grad.is_sparse:
        raise RuntimeError("NAdam does not support sparse gradients")
    if "exp_avg" not in state:
        device = param.device if group["capturable"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=_get_scalar_dtype(), device=device)
        state["mu_product"] = torch.ones((), dtype=_get_scalar_dtype(), device=device)
        for key in _states_of(group):
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    nadam(
        [param],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [state["mu_product"]],
        [state["step"]],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        foreach=False,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        has_complex=param.is_complex(),
        maximize=group["maximize"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum_decay=group["momentum_decay"],
        eps=group["eps"],
    )


RULES["nadam"] = TracedRule(
    ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay", "maximize", "decoupled_weight_decay"),
    _states_of,
    {"step": 0.0, "mu_product": 1.0},
    _update_by_torch,
)


class FusedNAdam(FusedOptimizer, NAdam):
    r"""NAdam, Adam with Nesterov's momentum, that updates a whole list of tensors in one pass.

    Takes the place of :class:`torch.optim.NAdam`: the same arguments, the same ``param_groups`` and state (``"step"``,
    ``"mu_product"``, ``"exp_avg"``, ``"exp_avg_sq"``), state dicts that load into either, and in fp32 and fp64 the same
    bits as ``NAdam(foreach=False)`` with correctly rounded square roots. For each element, with :math:`g` the gradient
    (negated if ``maximize``), :math:`p` the parameter, :math:`t` the step of its tensor and
    :math:`\mu_t = \beta_1 (1 - 0.96^{t \psi} / 2)`, ``momentum_decay`` :math:`\psi`:

    .. math::
        g &\leftarrow g + \lambda p                        &&\text{weight\_decay } \lambda;
                                                               \text{ decoupled: } p \leftarrow p - \gamma \lambda p \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g          &&\text{exp\_avg} \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2        &&\text{exp\_avg\_sq} \\
        p &\leftarrow p - \gamma \left( \frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i} g
            + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1} \mu_i} m \right)
            \Big/ \left( \sqrt{v / (1 - \beta_2^t)} + \epsilon \right)

    Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR 2016 workshop).

    Args:
        params: tensors or dicts of parameter groups, as :class:`momentum_ext.FusedMomentum` takes them.
        lr: learning rate, a float or a tensor of one element (default: 2e-3).
        betas: factors of the two averages (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty (default: 0).
        momentum_decay: how fast :math:`\mu_t` grows to :math:`\beta_1` (default: 4e-3).
        decoupled_weight_decay: decay the parameter instead of adding to the gradient (default: False).
        foreach, maximize, capturable, differentiable, state_dtype, max_grad_norm, process_group, ema_decay, ema_warmup,
            master_weights, stochastic_rounding, rounding_seed, compact_state_dict: as in
            :class:`momentum_ext.FusedAdam`.

    Raises:
        ValueError, TypeError, RuntimeError: where torch.optim.NAdam raises them, and from :meth:`step` for a tensor
            that cannot be updated, with its position in ``param_groups``; nothing has been written then.
    """

    _rule = "nadam"
    _options = OPTIONS
    _counters = ("step", "mu_product")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._keep_defaults()

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.NAdam takes it, see :meth:`FusedAdam.torch_state_dict`."""
        return as_torch_state_dict(self.state_dict(), self._options)

    _states_of = staticmethod(_states_of)
    _update_by_torch = staticmethod(_update_by_torch)
