"""The first call of a process under a mode, each in a child of its own; prints JSON lines: the mode, and what failed.

A child is forked after the imports and before any call, so that whatever is found out once is found out under the mode.
"""

import json
import os
import traceback

import torch
from harness import forbid_torchs_path
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
GRADS = [torch.arange(1.0, 9.0), torch.arange(8.0, 0.0, -1.0)]


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def optimizer(kind, params, **extra):
    return kind(params, **HYPER, **({"foreach": False} if kind is torch.optim.SGD else extra))


def trained(kind, value, steps=2, **extra):
    """A function of one tensor that steps inside."""
    param = value.detach().clone()
    opt = optimizer(kind, [param], **extra)
    for step in range(1, steps + 1):
        param.grad = value.detach().cos() * step
        opt.step()
    return param.detach()


def both(run):
    """`run(kind)` for ours, first, and for torch's loop; returns ours."""
    ours, torchs = run(FusedMomentum), run(torch.optim.SGD)
    if ours is not None or torchs is not None:
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0)
    return ours


def fake():
    with FakeTensorMode():
        out = trained(FusedMomentum, torch.ones(8))
    assert out.shape == (8,)


def fake_with_everything():
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(8))
        opt = optimizer(FusedMomentum, [param], ema_decay=0.9, nesterov=True)
        for _ in range(2):
            param.grad = torch.ones(8)
            opt.clip_grad_norm_(1.0)
            opt.step()
        with opt.ema_weights(), torch.no_grad():
            param.add_(1)


def functionalized():
    both(lambda kind: torch.func.functionalize(lambda x: trained(kind, x))(torch.ones(8)))


def func_grad():
    both(lambda kind: torch.func.grad(lambda x: (trained(kind, x) * x).sum())(torch.ones(8)))


def func_vmap():
    both(lambda kind: torch.func.vmap(lambda x: trained(kind, x))(torch.ones(3, 8)))


def over_a_parameter(transform):
    """Outside of the function that is transformed: torch's own step is right there, or raises; so is ours, or does."""

    def run(kind):
        param = torch.nn.Parameter(torch.ones(8))
        opt = optimizer(kind, [param])

        def function(x):
            param.grad = torch.ones(8)
            opt.step()
            return (x * param.detach()).sum()

        try:
            return transform(function)(torch.ones(8)), param.detach()
        except RuntimeError:
            assert kind is torch.optim.SGD or run(torch.optim.SGD) is None, "torch's own step does not raise"
            return None

    return lambda: both(run)


def traced(tracing_mode):
    def run(kind):
        graph = make_fx(lambda x: trained(kind, x), tracing_mode=tracing_mode)(torch.ones(8))
        return graph(torch.full((8,), 3.0))

    return lambda: both(run)


def traced_closure():
    """Over a parameter outside: the graph's own runs step it."""

    def run(kind):
        param = torch.nn.Parameter(torch.ones(8))
        opt = optimizer(kind, [param])
        param.grad = GRADS[0].clone()
        opt.step()

        def step(grad):
            param.grad = grad
            opt.step()
            return param.detach().clone()

        graph = make_fx(step)(GRADS[1].clone())
        with torch.no_grad():
            return [graph(GRADS[0].clone()), graph(GRADS[1].clone()), param.detach()]

    both(run)


def mem_tracker():
    def run(kind):
        model = torch.nn.Linear(8, 8)
        torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        opt = optimizer(kind, model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, opt)
        with tracker:
            model(torch.ones(2, 8)).sum().backward()
            opt.step()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
        return [p.detach() for p in model.parameters()], torch.tensor(float(peak["Total"]))

    both(run)


def default_device(device):
    def run(kind):
        with torch.device(device):
            return trained(kind, torch.ones(8, device="cpu"))

    return lambda: both(run)


def set_default_device():
    torch.set_default_device("meta")
    out = both(lambda kind: trained(kind, torch.ones(8, device="cpu")))
    torch.set_default_device(None)
    assert out.device.type == "cpu"


def default_dtype():
    torch.set_default_dtype(torch.float64)
    both(lambda kind: trained(kind, torch.ones(8, dtype=torch.float32)))
    torch.set_default_dtype(torch.float32)


def inference():
    def run(kind):
        param = torch.nn.Parameter(torch.ones(8))
        opt = optimizer(kind, [param])
        param.grad = torch.ones(8)
        with torch.inference_mode():
            opt.step()
        return param.detach()

    both(run)


def dispatch_mode_sees_what_it_sees_of_torch():
    """Not a step that passes by, and in mid-training as on the first call."""

    def run(kind):
        param = torch.nn.Parameter(torch.ones(8))
        opt = optimizer(kind, [param])
        writes = []
        for mode in (Counts(), None, Counts()):
            param.grad = GRADS[0].clone()
            if mode is None:
                opt.step()
                continue
            with mode:
                opt.step()
            writes.append(sorted(name for name in mode.seen if "_." in name))
        return param.detach(), writes

    ours, torchs = run(FusedMomentum), run(torch.optim.SGD)
    torch.testing.assert_close(ours[0], torchs[0], rtol=0, atol=0)
    assert any("add" in name for name in ours[1][0]) and ours[1][1], ours[1]


MODES = {
    "FakeTensorMode": fake,
    "FakeTensorMode with everything": fake_with_everything,
    "functionalize": functionalized,
    "torch.func.grad": func_grad,
    "torch.func.vmap": func_vmap,
    "torch.func.grad over a parameter": over_a_parameter(torch.func.grad),
    "functionalize over a parameter": over_a_parameter(torch.func.functionalize),
    "MemTracker": mem_tracker,
    "make_fx": traced("real"),
    "make_fx fake": traced("fake"),
    "make_fx symbolic": traced("symbolic"),
    "make_fx of a closure": traced_closure,
    "device meta": default_device("meta"),
    "device cpu": default_device("cpu"),
    "set_default_device": set_default_device,
    "set_default_dtype": default_dtype,
    "inference_mode": inference,
    "TorchDispatchMode": dispatch_mode_sees_what_it_sees_of_torch,
}


def afterwards():
    """Plain tensors are torch's bits, by the kernels."""

    forbid_torchs_path()
    both(lambda kind: trained(kind, torch.ones(8)))


def child(run):
    try:
        run()
        afterwards()
        return ""
    except BaseException:
        return traceback.format_exc()


def main():
    for name, run in MODES.items():
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            failed = child(run)
            with os.fdopen(write, "w") as pipe:
                json.dump(failed, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        print(json.dumps([name, json.loads(text) if text else f"died with status {status}"]), flush=True)


if __name__ == "__main__":
    main()
