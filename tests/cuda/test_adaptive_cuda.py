"""The adaptive rules on CUDA devices, real or emulated as in test_cuda.py, against NumPy in CUDA's arithmetic.

There torch divides by a number of the host by multiplying with its reciprocal, and contracts addcdiv: see csrc/rules/
math.h. So the oracle is not torch's loop on the CPU.
"""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
from typing import ClassVar

import numpy
import pytest
import torch
from devices import CPU, IS_EMULATION, ONE_LAUNCH, Twins, captured, capturing, cpu, cuda
from harness import assert_all_same, assert_same
from values import BF16, FP16, FP32, FP64, INT8, dtype_name, in_layout, nonzero

from momentum_ext import FusedAdam, FusedAdamW, FusedNAdam

pytestmark = [pytest.mark.filterwarnings("error")] if IS_EMULATION else [pytest.mark.cuda]

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.argtypes, _libm.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma_of_doubles = numpy.vectorize(_libm.fma, otypes=[numpy.float64])


def fma(a, b, c):
    """Rounded once; in fp32 by way of fp64, whose rounding is seen in one of 2^29 values."""
    if numpy.result_type(c) == numpy.float64:
        return _fma_of_doubles(a, b, c) if numpy.size(c) else c
    return (numpy.float64(a) * numpy.float64(b) + numpy.float64(c)).astype(numpy.float32)


class _InNumpy(torch.optim.Optimizer):
    """torch's rule and state; the step in NumPy, in fp32 or fp64, rounded once for each stored value."""

    state_dtypes: ClassVar[dict[str, torch.dtype]] = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(group, param, self.state[param])

    def _update(self, group, param, state):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group.get("amsgrad"))
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            if "momentum_decay" in group:
                state["mu_product"] = torch.tensor(1.0)
            for name in names:
                state[name] = torch.zeros_like(param, dtype=self.state_dtypes.get(name))
        tensors = [param, *(state[name] for name in names)]
        is_double = any(each.dtype == FP64 for each in (*tensors, param.grad))
        opmath, wide = (numpy.float64, FP64) if is_double else (numpy.float32, FP32)
        p, m, v, *largest = (each.to(wide).numpy().copy() for each in tensors)
        g = param.grad.to(wide).numpy()
        g = -g if group["maximize"] else g
        lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
        state["step"] += 1
        step = state["step"].item()
        if decay and group["decoupled_weight_decay"]:
            p = opmath(1 - lr * decay) * p
        elif decay:
            g = fma(opmath(decay), p, g)
        weight = opmath(1 - beta1)
        m = fma(weight, g - m, m) if weight < 0.5 else fma(weight - opmath(1), g - m, g)
        v = fma(opmath(1 - beta2) * g, g, opmath(beta2) * v)
        bias2, eps = 1 - beta2**step, opmath(group["eps"])
        if "momentum_decay" in group:
            mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (step, step + 1))
            state["mu_product"] *= mu
            product = state["mu_product"].item()
            denominator = numpy.sqrt(v * (opmath(1) / opmath(bias2))) + eps
            p = fma(opmath(-lr * (1 - mu) / (1 - product)), g / denominator, p)
            p = fma(opmath(-lr * next_mu / (1 - product * next_mu)), m / denominator, p)
        else:
            if largest:
                largest = [numpy.maximum(largest[0], v)]
            root = opmath(bias2**0.5)
            denominator = numpy.sqrt(largest[0] if largest else v) * (opmath(1) / root) + eps
            p = fma(opmath(-(lr / (1 - beta1**step))), m / denominator, p)
        for tensor, new in zip(tensors, (p, m, v, *largest), strict=True):
            tensor.copy_(torch.from_numpy(numpy.asarray(new)))


RULES = {
    "adam": (FusedAdam, torch.optim.Adam, [{}, {"weight_decay": 0.1, "maximize": True}, {"amsgrad": True}]),
    "adamw": (FusedAdamW, torch.optim.AdamW, [{}, {"betas": (0.3, 0.9), "amsgrad": True}]),
    "nadam": (FusedNAdam, torch.optim.NAdam, [{}, {"weight_decay": 0.1}, {"decoupled_weight_decay": True}]),
}
CASES = pytest.mark.parametrize(
    ("rule", "options"), [(name, options) for name, (_, _, each) in RULES.items() for options in each], ids=str
)
EACH_RULE = pytest.mark.parametrize("rule", RULES)
SHAPES = [(1,), (3, 0), (7,), (64, 33), (), (2049,), (30, 41), (2, 3, 4, 5)]
ON_DEVICE = {"adam": {"fused": True}, "adamw": {"capturable": True}, "nadam": {"capturable": True}}


def oracle_of(rule, state_dtypes=None):
    made = type("Oracle", (_InNumpy, RULES[rule][1]), {"state_dtypes": state_dtypes or {}})

    def oracle(params, **options):
        return made(params, **{key: value for key, value in options.items() if key not in ("fused", "capturable")})

    return oracle


def twins_of(rule, values=SHAPES, dtype=FP32, devices=(0,), oracle=None, mine=None, **options):
    torch.manual_seed(0)
    values = [torch.randn(value).to(dtype) if isinstance(value, tuple) else value for value in values]
    kind = type("AdaptiveTwins", (Twins,), {"kind": RULES[rule][0]})
    return kind(values, oracle or oracle_of(rule), devices=devices, mine=mine, **{"lr": 0.02, **options})


# -------------------------------------------------------------------------------------------- counts on the host


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=dtype_name)
@CASES
def test_bits_of_its_arithmetic_in_one_launch(rule, options, dtype):
    twins = twins_of(rule, dtype=dtype, **options)
    for step in range(4):
        twins.step(ONE_LAUNCH if step else 1)


@CASES
def test_layouts(rule, options):
    torch.manual_seed(0)
    values = [torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last), in_layout(torch.randn(30, 40), "column")]
    twins = twins_of(rule, [*values, torch.randn(20, 30), torch.randn(30, 100)[:, 5:85:2]], **options)
    for _ in range(3):
        twins.new_grads()
        twins.set_grad(2, nonzero((30, 20), FP32).t())
        twins.step_as_is()


@EACH_RULE
def test_late_gradients_are_steps_of_their_own_in_one_launch(rule):
    """Several counts, several groups."""
    values = [torch.randn(1 + i * 37 % 300) for i in range(40)]
    groups = [{"params": values[i::4], "lr": 0.1 * 0.9**i, "weight_decay": 0.1 * (i % 2)} for i in range(4)]
    kind = type("AdaptiveTwins", (Twins,), {"kind": RULES[rule][0]})
    twins = kind(groups, oracle_of(rule), lr=0.1)
    for step in range(4):
        twins.step(1, missing=range(step, 40, 5))
    assert len({int(cpu(entry["step"])) for entry in twins.mine.state.values()}) > 1


@EACH_RULE
def test_cpu_and_devices_in_one_list(rule):
    """On the CPU in the CPU's arithmetic: only the tensors on devices are compared to the bit."""
    twins = twins_of(rule, devices=(0, CPU, 1) if IS_EMULATION else (0, CPU))
    for _ in range(3):
        twins.new_grads()
        twins.both(lambda opt: opt.step())
        for mine, theirs in twins.params:
            torch.testing.assert_close(
                cpu(mine), theirs, rtol=0 if mine.is_cuda else 1e-5, atol=0 if mine.is_cuda else 1e-6
            )


@EACH_RULE
def test_averages_and_clipping_are_near_the_cpus(rule):
    torch.manual_seed(0)
    extra = {"max_grad_norm": 0.5, "ema_decay": 0.75}
    twins = twins_of(rule, oracle=RULES[rule][0], **extra)
    for _ in range(3):
        twins.new_grads()
        twins.both(lambda opt: opt.step())
        twins.check_params(1e-5, 1e-6)
        for mine, theirs in twins.params:
            average, expected = (opt.state[p]["ema"] for opt, p in zip(twins.optimizers, (mine, theirs), strict=True))
            torch.testing.assert_close(cpu(average), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("first", "second"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_states_of_16_bits_are_rounded_once(dtype, first, second, amsgrad):
    names = {"exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second}
    mine = {"state_dtype": names, "stochastic_rounding": False}
    twins = twins_of("adam", dtype=dtype, oracle=oracle_of("adam", names), mine=mine, amsgrad=amsgrad)
    for _ in range(3):
        twins.step(1)


@pytest.mark.parametrize("dtypes", [INT8, {"exp_avg": INT8}, {"exp_avg": BF16}, FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype, master", [(FP32, False), (BF16, True), (BF16, 24), (FP16, True)], ids=str)
@EACH_RULE
def test_low_precision_is_near_the_cpus(rule, dtype, master, dtypes):
    """One code of 8 bits may fall to the other side."""
    options = {"state_dtype": dtypes, "master_weights": master, "rounding_seed": 123}
    twins = twins_of(rule, [(257,), (64, 33), (), (5000,), (6, 5, 7, 3)], dtype, oracle=RULES[rule][0], **options)
    for _ in range(3):
        twins.new_grads()
        twins.both(lambda opt: opt.step())
    for mine, theirs in twins.params:
        off = (cpu(mine).float() - theirs.detach().float()).abs()
        assert off.max() < 0.03 and off.mean() < 2e-4


# ------------------------------------------------------------------------------------------ counts on the device


def steps_of(twins):
    return [cpu(twins.mine.state[mine]["step"]).item() for mine, _ in twins.params if mine in twins.mine.state]


@CASES
def test_steps_are_counted_on_the_device(rule, options):
    """A launch more, and nobody waits; the bits are the same, as the numbers are made in double there, too."""
    twins = twins_of(rule, **options, mine=ON_DEVICE[rule])
    for step in range(4):
        twins.step(2, missing=[2, 5] if step == 1 else ())
        entries = list(twins.mine.state.values())
        assert all(entry[key].is_cuda and entry[key].dtype == FP32 for entry in entries for key in ("step",))
    assert steps_of(twins) == [3.0 if index in (2, 5) else 4.0 for index in range(len(SHAPES))]


@EACH_RULE
def test_a_captured_step_counts_its_replays(rule):
    twins = twins_of(rule, mine=ON_DEVICE[rule])
    twins.step(2)
    twins.new_grads()
    replay = captured(twins.mine.step)
    twins.theirs.step()
    twins.check()
    for _ in range(3):
        replay()
        twins.theirs.step()
        twins.check()


@EACH_RULE
def test_a_capture_with_counts_on_the_host_is_refused(rule):
    twins = twins_of(rule)
    twins.step(1)
    twins.new_grads()
    with (
        pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\].*'step' is not on its device"),
        capturing(),
    ):
        twins.mine.step()
    assert steps_of(twins) == [1.0] * len(SHAPES)
    twins.theirs.step()
    twins.step_ours(1)
    twins.check()


@EACH_RULE
def test_a_capture_of_a_first_step_is_refused(rule):
    twins = twins_of(rule, mine=ON_DEVICE[rule])
    twins.new_grads()
    with pytest.raises(RuntimeError, match="no state yet"), capturing():
        twins.mine.step()


@pytest.mark.parametrize("on_device", [False, True])
@EACH_RULE
def test_overflows_that_only_the_device_knows(rule, on_device):
    """Counts go to the device where they are not there yet: nobody waits."""
    twins = twins_of(rule, mine=ON_DEVICE[rule] if on_device else {})
    for overflows in (True, False, False, True, False):
        twins.scaled_step(overflows, expected=2)
    assert steps_of(twins) == [3.0] * len(SHAPES)
    twins.step(2)


@EACH_RULE
def test_counts_that_come_from_the_host(rule):
    twins = twins_of(rule, mine=dict.fromkeys(ON_DEVICE[rule], False))
    twins.step(1)
    twins.mine.param_groups[0].update(ON_DEVICE[rule])
    for _ in range(2):
        twins.step(2)
    assert all(entry["step"].is_cuda for entry in twins.mine.state.values())


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=dtype_name)
@EACH_RULE
def test_an_lr_on_the_device(rule, dtype):
    """torch computes with an fp32 tensor in fp32: near the oracle."""
    twins = twins_of(rule, mine=ON_DEVICE[rule])
    lr = cuda(torch.tensor(0.02, dtype=dtype))
    twins.mine.param_groups[0]["lr"] = lr
    for value in (0.02, 0.05):
        cpu(lr).fill_(value) if IS_EMULATION else lr.fill_(value)
        twins.theirs.param_groups[0]["lr"] = value
        twins.new_grads()
        twins.step_ours(2)
        twins.theirs.step()
        twins.check_params(1e-5, 1e-6)


@EACH_RULE
def test_state_dicts_to_and_from_torch(rule):
    """Whose capturable and fused optimizers keep the step on the device, in fp32."""
    twins = twins_of(rule, mine=ON_DEVICE[rule])
    for _ in range(2):
        twins.step(2)
    saved = copy.deepcopy({key: value for key, value in twins.mine.torch_state_dict().items() if key == "param_groups"})
    saved["state"] = {
        index: {key: cpu(value).clone() for key, value in entry.items()}
        for index, entry in twins.mine.torch_state_dict()["state"].items()
    }
    theirs = twins.theirs.state_dict()["state"]
    assert saved["state"].keys() == theirs.keys()
    for index, entry in saved["state"].items():
        assert entry.keys() == theirs[index].keys()
        assert_all_same([entry[key] for key in sorted(entry)], [theirs[index][key] for key in sorted(entry)])
    # As torch hands them over: counters on the device.
    back = twins_of(rule, mine=ON_DEVICE[rule])
    back.mine.load_state_dict(
        {
            "param_groups": saved["param_groups"],
            "state": {
                index: {key: cuda(value.clone()) for key, value in entry.items()}
                for index, entry in saved["state"].items()
            },
        }
    )
    for (mine, _), (old, _) in zip(back.params, twins.params, strict=True):
        cpu(mine).copy_(cpu(old)) if IS_EMULATION else mine.data.copy_(old)
    back.theirs = twins.theirs
    back.step(2)
    assert steps_of(back) == [3.0] * len(SHAPES)


def test_more_tensors_than_a_launch_counts():
    twins = twins_of("adamw", [(3,)] * 1500, mine={"capturable": True})
    twins.new_grads()
    twins.both(lambda opt: opt.step())
    twins.check()
    assert steps_of(twins) == [1.0] * 1500


@EACH_RULE
def test_a_parameter_that_is_listed_twice_counts_twice(rule):
    torch.manual_seed(0)
    param = torch.nn.Parameter(cuda(torch.randn(50)))
    other = torch.nn.Parameter(cuda(cpu(param).clone()))
    optimizers = []
    for tensor, options in ((param, ON_DEVICE[rule]), (other, {})):
        with pytest.warns(UserWarning, match="duplicate"):
            optimizers.append(RULES[rule][0]([tensor, tensor], lr=0.1, **options))
        tensor.grad = cuda(torch.linspace(-1, 1, 50))
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        assert_same(cpu(param), cpu(other))
    assert cpu(optimizers[0].state[param]["step"]).item() == 6.0
