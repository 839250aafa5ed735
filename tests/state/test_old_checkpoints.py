"""Checkpoints that 0.1.0 wrote, in checkpoints_0_1_0: they load, and training goes on from them as it did there.

Each file has the parameters and the optimizer's state after three steps, the parameters at the look-ahead point, and
what three more steps of 0.1.0 made of them.
"""

from pathlib import Path

import pytest
import torch
from harness import assert_all_same, assert_same, refused

from momentum_ext import FusedMomentum

FILES = Path(__file__).parent / "checkpoints_0_1_0"
OPTIONS = {
    "plain": {"weight_decay": 0.01},
    "nesterov_eval": {"nesterov": True},
    "classical_eval": {"nesterov": True, "formulation": "classical"},
    "average": {"ema_decay": 0.9, "ema_warmup": True},
    "bf16_masters": {"master_weights": True},
    "fp16_masters": {"master_weights": True},
    "int8": {"momentum_dtype": torch.int8},
    "fp8": {"momentum_dtype": torch.float8_e4m3fn},
    "fp32_momentum": {"momentum_dtype": torch.float32},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 7},
    "ema_formulation": {"formulation": "ema", "decoupled_weight_decay": True, "weight_decay": 0.01},
}
EIGHT_BITS = {"int8", "fp8"}
MASTERS = {"bf16_masters": torch.bfloat16, "fp16_masters": torch.float16}
LOOKAHEAD_KEYS = {"lookahead", "train_mode", "lookahead_distance"}


def load(name):
    return torch.load(FILES / f"{name}.pt", weights_only=True)


def params_of(saved):
    return [torch.nn.Parameter(param.clone()) for param in saved["params"]]


def loaded(saved, **options):
    """lr and momentum are the checkpoint's."""
    params = params_of(saved)
    opt = FusedMomentum(params, lr=77.0, momentum=0.1, **options)
    opt.load_state_dict(saved["optimizer"])
    return opt, params


def step_three_times(opt, params):
    for step in range(3, 6):
        gen = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=gen).to(param.dtype)
        opt.step()


def test_all_files_have_a_case():
    assert {path.stem for path in FILES.iterdir()} == set(OPTIONS)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - EIGHT_BITS))
def test_training_goes_on_to_the_bit(name):
    """16-bit momentum beside masters stays so where it is asked for."""
    saved = load(name)
    options = OPTIONS[name] | ({"momentum_dtype": MASTERS[name]} if name in MASTERS else {})
    opt, params = loaded(saved, **options)
    assert_all_same(params, saved["lookahead"])
    step_three_times(opt, params)
    assert_all_same(params, saved["params_after"])
    if name == "average":
        assert opt.state_dict()["param_groups"][0]["ema_step"] == 6


@pytest.mark.parametrize("name", sorted(EIGHT_BITS))
def test_old_blocks_of_8_bits_are_read(name):
    """256 codes, linear in an fp32 scale: what they stand for is the momentum of the next step, to the bit."""
    saved = load(name)
    exact, _ = loaded(saved)  # momentum_dtype=None: the next step converts to the parameters' fp32
    opt, params = loaded(saved, **OPTIONS[name])
    for (param, entry), param_exact in zip(opt.state.items(), exact.state, strict=True):
        codes, scale = entry["momentum_buffer"], entry["momentum_scale"]
        assert scale.dtype == torch.float32 and len(scale) == -(-param.numel() // 256)
        values = codes.float().flatten() * scale.repeat_interleave(256)[: param.numel()]
        param.grad, param_exact.grad = torch.zeros_like(param), torch.zeros_like(param)
        entry["wanted"] = values.view_as(param) * exact.param_groups[0]["momentum"]
    exact.step()
    for entry, entry_exact in zip(opt.state.values(), exact.state.values(), strict=True):
        assert_same(entry_exact["momentum_buffer"], entry.pop("wanted"))
    opt.load_state_dict(opt.state_dict())  # in the new blocks
    step_three_times(opt, params)
    assert all(entry["momentum_scale"].dtype == torch.uint8 for entry in opt.state.values())
    coarsest = {"int8": 1018 / 81280, "fp8": 1 / 16}[name]
    for param, value, entry in zip(params, saved["params_after"], exact.state.values(), strict=True):
        largest = entry["momentum_buffer"].abs().max() + 3
        bound = opt.param_groups[0]["lr"] * coarsest * largest * 6  # three roundings, each in up to three steps
        assert ((param.detach() - value).abs() <= bound).all()


@pytest.mark.parametrize("name", MASTERS)
def test_momentum_beside_masters_becomes_fp32_at_the_next_step(name):
    saved = load(name)
    opt, params = loaded(saved, **OPTIONS[name])
    assert all(opt.state[param]["momentum_buffer"].dtype == MASTERS[name] for param in params)
    step_three_times(opt, params)
    for param, value in zip(params, saved["params_after"], strict=True):
        assert opt.state[param]["momentum_buffer"].dtype == torch.float32
        eps = torch.finfo(value.dtype).eps  # of momentum of about 1, times lr, over three steps
        torch.testing.assert_close(param.detach(), value, rtol=eps, atol=eps)


@pytest.mark.parametrize("formulation", ["torch", "classical"])
@pytest.mark.parametrize("name", ["nesterov_eval", "classical_eval"])
def test_what_was_saved_after_eval_is_back_at_the_lookahead_point(name, formulation):
    """Also in the other formulation, which the next step converts to."""
    saved = load(name)
    assert saved["optimizer"]["param_groups"][0]["train_mode"] is False
    assert not any(torch.equal(p, q) for p, q in zip(saved["params"], saved["lookahead"], strict=True))
    opt, params = loaded(saved, nesterov=True, formulation=formulation)
    assert_all_same(params, saved["lookahead"])
    for entry in (*opt.param_groups, *opt.state.values(), opt.state_dict()["param_groups"][0]):
        assert not LOOKAHEAD_KEYS & set(entry)
    with opt.iterate_weights():
        assert_all_same(params, saved["params"])
    step_three_times(opt, params)
    for param, value in zip(params, saved["params_after"], strict=True):
        torch.testing.assert_close(param.detach(), value)


def test_a_load_that_fails_moves_no_parameter():
    saved = load("nesterov_eval")
    params = params_of(saved)
    opt = FusedMomentum(params, lr=0.1, momentum=0.9, nesterov=True, formulation="ema")
    with refused(opt, ValueError, "formulation"):
        opt.load_state_dict(saved["optimizer"])


def test_torch_goes_on_from_it():
    saved = load("plain")
    opt, _ = loaded(saved, **OPTIONS["plain"])
    params = params_of(saved)
    sgd = torch.optim.SGD(params, lr=77.0, foreach=False)
    sgd.load_state_dict(opt.torch_state_dict())
    assert set(opt.state_dict()["param_groups"][0]) == set(sgd.state_dict()["param_groups"][0])
    step_three_times(sgd, params)
    assert_all_same(params, saved["params_after"])
