"""Low-precision states where someone else writes, lists a parameter twice, or compiles the step."""

import copy
import warnings

import pytest
import torch
from harness import assert_same, params_of, refused
from precision_twin import give_grads, optimizer_of
from values import BF16, EACH_COPY, FLOATS, FP32, HALF_DTYPES, INT8, dtype_name

from momentum_ext import _C, FusedMomentum


def random_param(*shape, dtype=FP32):
    return torch.nn.Parameter(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("-inf")])
def test_split_weights_that_someone_sets(value, sparse):
    """A pruning mask, say: what is left of the old value must not make a NaN of the new one."""
    param = random_param(500, 4, dtype=BF16)
    optimizer = optimizer_of(param, master_weights=True)
    for _ in range(5):
        assert not param.isnan().any()
        give_grads(optimizer)
        if sparse:
            param.grad = param.grad.to_sparse(1)
        optimizer.step()
        assert not param.isnan().any()
        with torch.no_grad():
            param[::2] = value


def twice_listed(param, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of duplicates
        return FusedMomentum([param, param], lr=0.1, momentum=0.9, **options)


@pytest.mark.parametrize("options", [{"momentum_dtype": BF16}, {"momentum_dtype": INT8}, {"master_weights": True}])
def test_a_parameter_that_is_listed_twice(options):
    """Turned on in mid-run: both updates of a step use one state, as two steps would."""
    start = torch.randn(1000).to(BF16)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    once, twice = optimizer_of(params[0]), twice_listed(params[1])
    params[1].grad = params[0].grad.clone()
    for param, optimizer in zip(params, (once, twice), strict=True):
        optimizer.state[param] = {"momentum_buffer": torch.full_like(param, 0.25).detach()}
        optimizer.param_groups[0].update(options)
    once.step()
    once.step()
    twice.step()
    assert_same(params[1], params[0])
    assert twice.state[params[1]].keys() == once.state[params[0]].keys()
    for name, tensor in once.state[params[0]].items():
        assert_same(twice.state[params[1]][name], tensor, name)


@HALF_DTYPES
def test_masters_know_nothing_of_autograd(dtype):
    param = random_param(300, dtype=dtype)
    optimizer = optimizer_of(param, steps=1, master_weights=True, momentum_dtype=INT8)
    assert not any(tensor.requires_grad for tensor in optimizer.state[param].values())
    copy.deepcopy(optimizer)
    copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("stored", [*FLOATS, INT8], ids=dtype_name)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_what_a_plain_optimizer_loads(dtype, stored):
    """Buffers as they were saved, then in the parameters' dtype, as torch would have them."""
    source = random_param(10, 32, dtype=FP32 if stored is INT8 else stored)
    saved = optimizer_of(source, steps=1, **({"momentum_dtype": INT8} if stored is INT8 else {}))
    param = random_param(10, 32, dtype=dtype)
    optimizer = optimizer_of(param)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert optimizer.state[param]["momentum_buffer"].dtype is stored
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].dtype is dtype
    assert optimizer.state[param].keys() == {"momentum_buffer"}


def test_a_scale_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected two bytes for each 32 elements of its 300, got Float of 1"):
        _C.dequantize(torch.zeros(300, dtype=INT8), torch.ones(1), (300,))


def test_a_compiled_step_after_the_options_were_taken_back():
    """The state is converted first, by the eager step between two graphs."""
    param = random_param(300, dtype=BF16)
    optimizer = optimizer_of(param, steps=1, master_weights=True, momentum_dtype=INT8)
    optimizer.param_groups[0].update(master_weights=False, momentum_dtype=None)
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer.state[param].keys() == {"momentum_buffer"}
    assert optimizer.state[param]["momentum_buffer"].dtype is BF16


def test_the_count_of_steps_is_in_live_groups():
    """What flattens a checkpoint takes its keys from them."""
    assert optimizer_of(random_param(30, dtype=BF16), stochastic_rounding=True).param_groups[0]["rounding_step"] == 0


@pytest.mark.parametrize("options", [{"momentum_dtype": BF16}, {"master_weights": True}])
def test_a_sparse_step_that_fails_writes_nothing(options):
    params = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    optimizer = FusedMomentum(params, lr=0.1, momentum=0.9, **options)
    for param, is_sparse in zip(params, (False, True, True), strict=True):
        param.grad = torch.ones(4, 2).to_sparse(1) if is_sparse else torch.ones(4, 2)
    optimizer.step()
    params[2].grad = torch.ones(4, 2)  # torch cannot add it to a sparse buffer
    with refused(optimizer, RuntimeError, "sparse"):
        optimizer.step()


@EACH_COPY
def test_an_option_is_taken_back_after_a_copy(copied):
    optimizer = copied(optimizer_of(random_param(300), steps=1, momentum_dtype=BF16))
    optimizer.param_groups[0]["momentum_dtype"] = None
    give_grads(optimizer)
    optimizer.step()
    assert optimizer.state[params_of(optimizer)[0]]["momentum_buffer"].dtype is FP32


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("master_weights", "no", "a bool, 24 or 32"),
        ("master_weights", 16, "a bool, 24 or 32"),
        ("master_weights", 24.0, "a bool, 24 or 32"),
        ("stochastic_rounding", 1, "a bool or None"),
    ],
)
def test_switches(option, value, expected):
    with pytest.raises(TypeError, match=f"Invalid {option}: {value!r}; expected {expected}"):
        optimizer_of(random_param(3), **{option: value})


def test_an_edit_to_a_switch_that_there_is_not():
    optimizer = optimizer_of(random_param(3, dtype=BF16), steps=1)
    optimizer.param_groups[0]["master_weights"] = 16
    with refused(optimizer, ValueError, r"param_groups\[0\]\['master_weights'\]: expected a bool, 24 or 32, got 16"):
        optimizer.step()
