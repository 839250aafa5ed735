"""Keys that torch.optim.SGD does not have: of a parameter's state, and of parameter groups."""

from __future__ import annotations

__all__ = [
    "AVERAGE",
    "AVERAGE_COUNT",
    "BUFFER",
    "BUFFER_FORMULATION",
    "LOOKAHEAD",
    "MASTER",
    "OPTIONS",
    "REMAINDER",
    "ROUNDING_STEP",
    "SCALE",
]

# Of a parameter's state. The first is torch's own.
BUFFER = "momentum_buffer"
SCALE = "momentum_scale"  # of a buffer of 8 bits
REMAINDER = "param_remainder"  # of a bf16 parameter with a master: 16 or 8 more bits
MASTER = "master_param"  # of a fp16 parameter with a master: the fp32 value
AVERAGE = "ema"
LOOKAHEAD = "lookahead"  # in checkpoints of 0.1.0 alone, saved after eval()

# Options of a group, with their defaults. A group that uses none of them has no such key.
OPTIONS = {
    "formulation": "torch",
    "decoupled_weight_decay": False,
    "momentum_dtype": None,
    "master_weights": False,
    "stochastic_rounding": None,
    "rounding_seed": 0,
}

# What a group says of its tensors' state, each beside the option that it belongs to.
BUFFER_FORMULATION = "buffer_formulation"  # that the momentum buffers are in
AVERAGE_COUNT = "ema_step"  # updates of the averages
ROUNDING_STEP = "rounding_step"  # steps: random numbers depend on it
