"""What FlashOptim 0.1.4 stores (Ortiz et al., arXiv:2602.23349), in torch: for its errors, not its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32


class FlashFormats(torch.optim.Optimizer):
    """SGD with momentum in the formats of FlashSGD: 6.06 bytes for each element, its gradient included.

    bf16 parameters have corrections of 8 bits, rounded to nearest. Momentum has codes of 8 bits on a softsign scale,
    with a scale in fp16 for each 32 of them.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})
        for param in self.param_groups[0]["params"]:
            codes = torch.zeros(-(-param.numel() // BLOCK), BLOCK, dtype=torch.int8)
            self.state[param] = {
                "correction": torch.zeros_like(param, dtype=torch.int8),
                "codes": codes,
                "scale": torch.zeros(len(codes), 1, dtype=torch.float16),
            }

    def exact(self, param: Tensor) -> Tensor:
        """The fp32 value of a parameter: with its correction, in 127ths of half a unit in the last place."""
        value = param.detach().float()
        correction: Tensor = self.state[param]["correction"]
        return value + correction.float() / 127 * _half_unit(value)

    def iterate_weights(self) -> AbstractContextManager[None]:
        """As FusedMomentum's, of parameters that have not looked ahead."""
        return nullcontext()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                state, value = self.state[param], self.exact(param)
                y = state["codes"].float() / 127
                buffer = (y / (2 - y.abs()) * state["scale"].float()).flatten()[: param.numel()].view_as(param)
                grad = param.grad.float() + group["weight_decay"] * value
                buffer = group["momentum"] * buffer + grad
                value -= group["lr"] * (grad + group["momentum"] * buffer if group["nesterov"] else buffer)
                blocks = pad(buffer.flatten(), (0, -buffer.numel() % BLOCK)).view(-1, BLOCK)
                state["scale"] = blocks.abs().amax(1, keepdim=True).half()
                x = blocks / state["scale"].float().clamp_min(1e-38)
                state["codes"] = torch.round(127 * (2 * x / (1 + x.abs())).clamp(-1, 1)).to(torch.int8)
                param.copy_(value)
                rest = (value - param.float()) / _half_unit(param.float())
                state["correction"] = torch.round(127 * rest.clamp(-1, 1)).to(torch.int8)


def _half_unit(value: Tensor) -> Tensor:
    """Half a unit in the last place of bf16 values."""
    return torch.floor(torch.log2(value.abs().clamp_min(2.0**-126))).sub(8).exp2()
