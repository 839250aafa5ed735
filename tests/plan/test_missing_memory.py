"""Storage that was freed or shrunk, as FSDP does it: an error that names it, and nothing is written."""

import pytest
import torch
from harness import params_of, refused
from values import BF16, FP8, FP16, FP32, INT8, clone_params, in_layout

import momentum_ext
from momentum_ext import FusedMomentum


def step_with_scaler(opt):
    scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(opt)


def sparse_step(opt):
    """Torch's own path."""
    for param in params_of(opt):
        param.grad = torch.randn(param.shape).to(param.dtype).to_sparse(1)
    opt.step()


def converting_step(opt):
    opt.param_groups[0]["momentum_dtype"] = FP16
    opt.step()


def enter(context):
    def act(opt):
        with getattr(opt, context)():
            pytest.fail("entered")

    return act


ACTIONS = {
    "step": FusedMomentum.step,
    "scaler": step_with_scaler,
    "sparse step": sparse_step,
    "converting step": converting_step,
    "clip": lambda opt: opt.clip_grad_norm_(1.0),
    "ema_weights": enter("ema_weights"),
    "iterate_weights": enter("iterate_weights"),
}
STEPS, OTHERS = ("step", "scaler"), ("sparse step", "converting step")
# What is missing, the parameters' dtype, options, and who touches it.
TENSORS = [
    ("param", FP32, {}, [*STEPS, "iterate_weights"]),
    ("param", FP32, {"ema_decay": 0.9}, [*STEPS, "ema_weights", "iterate_weights"]),
    ("grad", FP32, {}, [*STEPS, "clip"]),
    ("grad", BF16, {"max_grad_norm": 1.0}, [*STEPS, "clip"]),
    ("momentum_buffer", FP32, {}, [*STEPS, *OTHERS, "iterate_weights"]),
    ("momentum_buffer", FP32, {"ema_decay": 0.9}, STEPS),
    ("momentum_buffer", FP32, {"momentum_dtype": BF16}, STEPS),
    ("momentum_buffer", FP32, {"momentum_dtype": INT8}, [*STEPS, *OTHERS, "iterate_weights"]),
    ("momentum_buffer", BF16, {"master_weights": True}, OTHERS),
    ("momentum_scale", FP32, {"momentum_dtype": INT8}, [*STEPS, *OTHERS, "iterate_weights"]),
    ("momentum_scale", BF16, {"momentum_dtype": FP8, "master_weights": True}, OTHERS),
    ("param_remainder", BF16, {"master_weights": True}, [*STEPS, *OTHERS]),
    ("master_param", FP16, {"master_weights": True}, [*STEPS, *OTHERS]),
    ("ema", FP32, {"ema_decay": 0.9}, [*STEPS, "ema_weights"]),
    ("ema", BF16, {"ema_decay": 0.9}, [*STEPS, "ema_weights"]),
    ("ema", FP16, {"ema_decay": 0.9, "momentum_dtype": BF16}, OTHERS),
]
CASES = [(*row[:3], action) for row in TENSORS for action in row[3]]


@pytest.mark.parametrize("how", ["freed", "shrunk"])
@pytest.mark.parametrize("layout", ["contiguous", "column"])
@pytest.mark.parametrize(
    "what, dtype, hyper, action", CASES, ids=lambda value: "-".join(value) if isinstance(value, dict) else None
)
def test_is_refused(what, dtype, hyper, action, layout, how):
    """Twice, as a context that was not entered is not there to leave."""
    params = clone_params([in_layout(torch.randn(50, 20).to(dtype), each) for each in ("contiguous", layout)])
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, nesterov=True, **hyper)
    for _ in range(2):
        for param in params:
            param.grad = in_layout(torch.randn(50, 20).to(dtype), layout)
        opt.step()
    storage = {"param": params[1], "grad": params[1].grad, **opt.state[params[1]]}[what].untyped_storage()
    storage.resize_(0 if how == "freed" else storage.nbytes() // 2)
    name = what if what in ("param", "grad") else f"{what} of "
    for _ in range(2):
        but = ("grads",) if action == "sparse step" else ("groups",) if action == "converting step" else ()
        with refused(opt, RuntimeError, rf"{name}.*{storage.nbytes()} bytes|{name}.*freed or resized", *but):
            ACTIONS[action](opt)
    if what == "grad" and action == "step":  # once its memory is back, training goes on
        params[1].grad = torch.ones(50, 20, dtype=dtype)
        opt.step()
