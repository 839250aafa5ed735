"""What storing momentum in 8 bits costs: the squared error over the square, in millionths, of made-up momenta.

    python examples/precision_blocks.py

The last two rows are what the kernels store. The others are prototypes of what they are compared with: the linear
blocks of Dettmers et al. (ICLR 2022), and FlashOptim's (Ortiz et al., 2026, arXiv:2602.23349).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from momentum_ext import _C

N, COLUMNS = 1 << 16, 512


def momenta() -> dict[str, Tensor]:
    """float32 [N] of several shapes of distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(N, generator=generator)
    widths = torch.randn(COLUMNS, generator=generator).mul(1.5).exp()
    tails = torch.randn(3, N, generator=generator).square().mean(0).sqrt()  # a t-distribution's, of 3 degrees
    return {
        "normal": normal,
        "columns differ": (normal.view(-1, COLUMNS) * widths).flatten(),
        "heavy tails": normal / tails,
        "times 1e-29": normal * 1e-29,
        "times 1e30": normal * 1e30,
    }


def companded(levels: Tensor, block: int, scale_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Stores the nearest of the levels, which go from -1 to 1, of the largest value in a block."""
    middles = (levels[1:] + levels[:-1]) / 2

    def stored(values: Tensor) -> Tensor:
        blocks = values.view(-1, block)
        scale = blocks.abs().amax(1, keepdim=True).to(scale_dtype).float()
        place = torch.bucketize((blocks / scale.clamp_min(1e-38)).clamp(-1, 1), middles)
        return (levels[place] * scale).flatten()

    return stored


def ours(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda values: _C.dequantize(*_C.quantize(values, dtype, values), values.shape)


def main() -> None:
    y = torch.arange(-127, 128) / 127
    formats = {
        "linear, 256, fp32 scale        8.125": companded(y, 256, torch.float32),
        "FlashOptim: 32, fp16 scale     8.5  ": companded(y / (2 - y.abs()), 32, torch.float16),
        "int8                           8.5  ": ours(torch.int8),
        "float8_e4m3fn                  8.5  ": ours(torch.float8_e4m3fn),
        "int4                           4.5  ": ours(torch.uint8),
    }
    made = momenta()
    print(f"{'format                   bits/element':<36}  {'  '.join(f'{name:>14}' for name in made)}")
    for label, stored in formats.items():
        errors = [(stored(x) - x).double().square().sum() / x.double().square().sum() * 1e6 for x in made.values()]
        print(f"{label}  {'  '.join(f'{float(error):14,.1f}' for error in errors)}")


if __name__ == "__main__":
    main()
