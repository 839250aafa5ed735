"""Keys that torch's optimizers do not have: of a parameter's state, and of parameter groups."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AVERAGE",
    "AVERAGE_COUNT",
    "BUFFER",
    "BUFFER_FORMULATION",
    "COUNTERS",
    "LOOKAHEAD",
    "MASTER",
    "MOMENTUM_OPTIONS",
    "NON_NEGATIVE",
    "OPTIONS",
    "REMAINDER",
    "ROUNDING_STEP",
    "SCALE",
    "SCALE_OF",
]

# Of a parameter's state. The first is torch's own.
BUFFER = "momentum_buffer"
SCALE = "momentum_scale"  # of a buffer of 8 bits
SCALE_OF = {  # by the states of all rules
    BUFFER: SCALE,
    "exp_avg": "exp_avg_scale",
    "exp_avg_sq": "exp_avg_sq_scale",
    "max_exp_avg_sq": "max_exp_avg_sq_scale",
}
NON_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq")  # 8 bits have their roots, as uint8
COUNTERS = ("step", "mu_product")  # torch's own: numbers on the CPU, unless a group is capturable
REMAINDER = "param_remainder"  # of a bf16 parameter with a master: 16 or 8 more bits
MASTER = "master_param"  # of a fp16 parameter with a master: the fp32 value
AVERAGE = "ema"
LOOKAHEAD = "lookahead"  # in checkpoints of 0.1.0 alone, saved after eval()

# Options of a group, with their defaults. A group that uses none of them has no such key.
OPTIONS: dict[str, Any] = {
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": None,
    "rounding_seed": 0,
}
MOMENTUM_OPTIONS: dict[str, Any] = {
    "formulation": "torch",
    "decoupled_weight_decay": False,
    "momentum_dtype": None,
    **OPTIONS,
}

# What a group says of its tensors' state, each beside the option that it belongs to.
BUFFER_FORMULATION = "buffer_formulation"  # that the momentum buffers are in
AVERAGE_COUNT = "ema_step"  # updates of the averages
ROUNDING_STEP = "rounding_step"  # steps: random numbers depend on it
