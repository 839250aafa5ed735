"""What a state that is never negative holds in 8 bits, in NumPy and to the bit, from its description alone.

The root y of a value is stored: of code c it is c * (c + 385) times the scale of its block of 32. A scale has 8 bits of
exponent and 8 of mantissa. NumPy rounds roots, products and quotients once, as the kernels do.
"""

from __future__ import annotations

import numpy as np
from precision_oracle import BLOCK, F32, U32, bits, cut, nearest_code, scales_of

LEVELS = np.array([c * (c + 385) for c in range(256)])
TOP = F32(LEVELS[-1])
SMALLEST = cut(F32(2.0**-63) / TOP)[0]
LARGEST = cut(F32(2.0**64) / TOP)[0]


def quantize(values: np.ndarray, random: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 codes, the scales as bytes, [blocks, 2]). `random`: 16 bits for each element of all blocks, whole ones."""
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK), F32)
    blocks.reshape(-1)[: len(values)] = values
    blocks = np.abs(blocks)
    largest = np.max(blocks, axis=1, initial=0)  # NaN where there is one
    overflows = ~np.isfinite(largest)
    largest = np.where(overflows, F32(1), largest)
    exact = np.sqrt(largest) / TOP
    if random is None:
        scale = cut(exact, 0x4000)
    else:  # up with the probability of the place between two squares
        random = random.reshape(-1, BLOCK)
        down, up = cut(exact), cut(exact, 0x8000)
        knee, top = (TOP * down) ** 2, (TOP * up) ** 2
        chance = ((random[:, 0] ^ random[:, 1]) & U32(0x7FFF)).astype(F32) + F32(0.5)
        scale = np.where(chance * F32(2.0**-15) * (top - knee) < largest - knee, up, down)
    scale = np.minimum(scale, LARGEST)
    vanishes = scale < SMALLEST
    dead = overflows | vanishes
    inverse = (F32(1) / np.where(dead, F32(1), scale))[:, None]
    blocks = np.where(dead[:, None], F32(0), blocks)
    if random is None:
        units = np.sqrt(blocks) * inverse
        codes = nearest_code(units, LEVELS)
    else:  # values above the largest that a smaller scale can store move with it
        top = (TOP * scale) ** 2
        stretch = np.where(scale > down, (top - knee) / np.where(largest > knee, largest - knee, F32(1)), F32(0))
        above = np.maximum(blocks - knee[:, None], F32(0)) * stretch[:, None]
        moved = np.minimum(blocks, knee[:, None]) + above
        units = np.minimum(np.sqrt(moved) * (bits(inverse) + U32(2)).view(F32), TOP)
        codes = np.searchsorted(LEVELS.astype(F32), units, side="right") - 1
        level, gap = LEVELS[codes].astype(F32), np.append(np.diff(LEVELS), 896)[codes].astype(F32)
        chance = (random.astype(F32) + F32(0.5)) * (gap * F32(2.0**-16) * (2 * level + gap))
        codes = codes + ((units - level) * (units + level) > chance)
    codes = np.where(units > 0, np.maximum(codes, 1), 0).astype(np.uint8)
    kept = np.where(overflows, F32(np.nan), np.where(vanishes, F32(0), scale))
    as_bytes = (bits(kept) >> U32(15)).astype("<u2").view(np.uint8).reshape(-1, 2)
    return codes.reshape(-1)[: len(values)].copy(), as_bytes


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    root = LEVELS[codes].astype(F32) * np.repeat(scales_of(scale), BLOCK)[: len(codes)]
    return root * root
