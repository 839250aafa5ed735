"""What small learning rates lose where weights are stored in few bits: how much of the way, and the error beside fp64.

    python examples/precision_stalls.py

200,000 weights of about 0.02, as in a large model, and 400 steps of momentum 0.9, with gradients that mostly agree. In
per cent of the way that torch.optim.SGD goes in fp64: what is missing of it, and the distance from where it ends.
"""

from __future__ import annotations

from typing import Any

import torch

from momentum_ext import FusedMomentum

N, STEPS = 200_000, 400
RATES = (1e-5, 1e-6, 1e-7)
MODES: dict[str, dict[str, Any]] = {
    "master_weights=True": {"master_weights": True},
    "master_weights=24": {"master_weights": 24},
    "master_weights=24, stochastic_rounding=False": {"master_weights": 24, "stochastic_rounding": False},
    "stochastic_rounding=True": {"stochastic_rounding": True},
    "bf16 alone": {},
}


def losses(lr: float, options: dict[str, Any]) -> tuple[float, float]:
    """(missing, distance), in per cent of the way."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(N, generator=generator).mul(0.02).bfloat16())
    exact = torch.nn.Parameter(param.detach().double())
    start = exact.detach().clone()
    optimizer = FusedMomentum([param], lr=lr, momentum=0.9, momentum_dtype=torch.float32, **options)
    truth = torch.optim.SGD([exact], lr=lr, momentum=0.9, foreach=False)
    direction = torch.randn(N, generator=generator) * 0.3
    for _ in range(STEPS):
        param.grad = (direction + torch.randn(N, generator=generator)).bfloat16()
        exact.grad = param.grad.double()
        optimizer.step()
        truth.step()
    found = optimizer.fp32_state_dict(torch.nn.ParameterList([param]))["0"].double()
    way, rest = exact.detach() - start, exact.detach() - found
    return 100 * (rest @ way / (way @ way)).item(), 100 * (rest.norm() / way.norm()).item()


def main() -> None:
    print(f"{'% of the way: missing, distance':<46}" + "".join(f"{f'lr {lr:.0e}':>18}" for lr in RATES))
    for name, options in MODES.items():
        cells = [losses(lr, options) for lr in RATES]
        print(
            f"{name:<46}" + "".join(f"{round(missing, 2) + 0.0:>10.2f}{distance:>8.2f}" for missing, distance in cells)
        )


if __name__ == "__main__":
    main()
