"""What small learning rates lose where weights are stored in few bits: how much of the way, and the error beside fp64.

    python examples/precision_stalls.py

200,000 weights of about 0.02, as in a large model, and 400 steps of momentum 0.9, with gradients that mostly agree. In
per cent of the way that torch.optim.SGD goes in fp64: what is missing of it, and the distance from where it ends.
"""

from __future__ import annotations

from typing import Any

import torch
from precision_modes import BF16, FLASH, FP32, MASTER, MASTER_24, SR, Mode, truth

N, STEPS = 200_000, 400
RATES = (1e-5, 1e-6, 1e-7)
WIDE: dict[str, Any] = {"momentum_dtype": FP32}
MODES = (
    Mode("master_weights=True", BF16, {**WIDE, **MASTER}),
    Mode("master_weights=24", BF16, {**WIDE, **MASTER_24}),
    Mode("master_weights=24, stochastic_rounding=False", BF16, {**WIDE, **MASTER_24, "stochastic_rounding": False}),
    Mode("stochastic_rounding=True", BF16, {**WIDE, **SR}),
    Mode("bf16 alone", BF16, WIDE),
    FLASH,
)


def losses(lr: float, mode: Mode) -> tuple[float, float]:
    """(missing, distance), in per cent of the way."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(N, generator=generator).mul(0.02).bfloat16().to(mode.param))
    exact = torch.nn.Parameter(param.detach().double())
    start = exact.detach().clone()
    optimizer = mode.optimizer([param], lr=lr, momentum=0.9)
    exactly = torch.optim.SGD([exact], lr=lr, momentum=0.9, foreach=False)
    direction = torch.randn(N, generator=generator) * 0.3
    for _ in range(STEPS):
        param.grad = (direction + torch.randn(N, generator=generator)).bfloat16().to(mode.param)
        exact.grad = param.grad.double()
        optimizer.step()
        exactly.step()
    found = truth(optimizer, param).double()
    way, rest = exact.detach() - start, exact.detach() - found
    return 100 * (rest @ way / (way @ way)).item(), 100 * (rest.norm() / way.norm()).item()


def main() -> None:
    print(f"{'% of the way: missing, distance':<46}" + "".join(f"{f'lr {lr:.0e}':>18}" for lr in RATES))
    for mode in MODES:
        cells = [losses(lr, mode) for lr in RATES]
        figures = [f"{round(missing, 2) + 0.0:>10.2f}{distance:>8.2f}" for missing, distance in cells]
        print(f"{mode.name:<46}" + "".join(figures))


if __name__ == "__main__":
    main()
