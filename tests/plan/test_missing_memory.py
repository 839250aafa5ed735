"""Storage that was freed or shrunk, as FSDP does it: an error that names it, and nothing is written."""

import pytest
import torch
from harness import clone_params, in_layout, memory_of

import momentum_ext
from momentum_ext import FusedMomentum

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def step_with_scaler(opt):
    scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(opt)


def enter(context):
    def act(opt):
        with getattr(opt, context)():
            pytest.fail("entered")

    return act


ACTIONS = {
    "step": FusedMomentum.step,
    "scaler": step_with_scaler,
    "clip": lambda opt: opt.clip_grad_norm_(1.0),
    "ema_weights": enter("ema_weights"),
    "iterate_weights": enter("iterate_weights"),
}
# What is missing, its name in errors, the parameters' dtype, options, and who else than the step touches it.
TENSORS = [
    ("param", "param", FP32, {}, ["iterate_weights"]),
    ("param", "param", FP32, {"ema_decay": 0.9}, ["ema_weights", "iterate_weights"]),
    ("grad", "grad", FP32, {}, ["clip"]),
    ("grad", "grad", BF16, {"max_grad_norm": 1.0}, ["clip"]),
    ("momentum_buffer", "momentum_buffer", FP32, {}, ["iterate_weights"]),
    ("momentum_buffer", "momentum_buffer", FP32, {"ema_decay": 0.9}, []),
    ("momentum_buffer", "momentum_buffer", FP32, {"momentum_dtype": BF16}, []),
    ("momentum_buffer", "momentum_buffer", FP32, {"momentum_dtype": torch.int8}, ["iterate_weights"]),
    ("momentum_scale", "momentum_scale", FP32, {"momentum_dtype": torch.int8}, ["iterate_weights"]),
    ("param_remainder", "param_remainder", BF16, {"master_weights": True}, []),
    ("master_param", "master_param", FP16, {"master_weights": True}, []),
    ("ema", "ema", FP32, {"ema_decay": 0.9}, ["ema_weights"]),
    ("ema", "ema", BF16, {"ema_decay": 0.9}, ["ema_weights"]),
]
CASES = [(*row[:4], action) for row in TENSORS for action in ("step", "scaler", *row[4])]


@pytest.mark.parametrize("how", ["freed", "shrunk"])
@pytest.mark.parametrize("layout", ["contiguous", "column"])
@pytest.mark.parametrize(
    "tensor, name, dtype, hyper, action", CASES, ids=lambda value: "-".join(value) if isinstance(value, dict) else None
)
def test_is_refused(tensor, name, dtype, hyper, action, layout, how):
    params = clone_params([in_layout(torch.randn(50, 20).to(dtype), each) for each in ("contiguous", layout)])
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, nesterov=True, **hyper)
    for _ in range(2):
        for param in params:
            param.grad = in_layout(torch.randn(50, 20).to(dtype), layout)
        opt.step()
    held = {"param": params[1], "grad": params[1].grad, **opt.state[params[1]]}
    storage = held[tensor].untyped_storage()
    storage.resize_(0 if how == "freed" else storage.nbytes() // 2)
    tensors = [t for p in params for t in (p, p.grad, *opt.state[p].values())]
    before = [(t._version, memory_of(t.untyped_storage(), t.dtype).clone()) for t in tensors]
    with pytest.raises(RuntimeError, match=name):
        ACTIONS[action](opt)
    for t, (version, memory) in zip(tensors, before, strict=True):
        assert t._version == version
        assert torch.equal(memory_of(t.untyped_storage(), t.dtype).view(torch.uint8), memory.view(torch.uint8))
