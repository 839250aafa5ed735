"""CUDA devices, by one suite: on a real one with `pytest --device cuda` (make gpu-check), on emulated ones from
test_emulated_cuda.py (make test-all). The kernels by themselves: native/ (make test-all), make cuda-check.
"""

import copy
import warnings

import pytest
import torch
from devices import (
    COUNTED,
    CPU,
    DEVICES,
    IS_EMULATION,
    ONE_LAUNCH,
    Twins,
    captured,
    capturing,
    cpu,
    cuda,
    emulated,
    failing_launches,
    launches,
    no_waiting,
    real,
)
from harness import (
    Oracle,
    Pair,
    assert_all_same,
    assert_same,
    assert_same_training,
    counts_of,
    for_loop,
    is_clipping,
    norm_in_double,
    one_process_group,
    params_of,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from values import (
    BF16,
    EXACT_DTYPES,
    FLOAT_DTYPES,
    FP8,
    FP16,
    FP32,
    FP64,
    HALVES,
    INT4,
    INT8,
    dtype_name,
    in_layout,
    nonzero,
)

import momentum_ext
from momentum_ext import FusedMomentum
from momentum_ext.dtensor import local

pytestmark = [pytest.mark.filterwarnings("error")] if IS_EMULATION else [pytest.mark.cuda]

SHAPES = [(1,), (3, 0), (7,), (64, 33), (), (4095,), (4096,), (4097,), (30, 101), (2, 3, 4, 5)]
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]
FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
FORMULATIONS = pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "formulation": formulation, **rest}
        for formulation in ("classical", "ema")
        for rest in ({}, {"nesterov": True, "decoupled_weight_decay": True, "maximize": True})
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)


def twins_of(shapes=SHAPES, dtype=FP32, oracle=Oracle, devices=(0,), mine=None, **options):
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    return Twins(values, oracle, devices=devices, mine=mine, **(options or FULL))


# ----------------------------------------------------------------------------------------------------- exactness


@FLOAT_DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_of_torch_in_one_launch(options, dtype):
    """Of its for-loop on the CPU, in 16 bits rounded once."""
    twins = twins_of(dtype=dtype, **options)
    for _ in range(4):
        twins.step(ONE_LAUNCH)


@real
@EXACT_DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_of_torch_on_its_device(options, dtype):
    twins = twins_of(dtype=dtype, **options)
    params = [torch.nn.Parameter(mine.detach().clone()) for mine, _ in twins.params]
    loop = for_loop(params, **options)
    for _ in range(4):
        twins.step()
        for param, (mine, _) in zip(params, twins.params, strict=True):
            param.grad = mine.grad.clone()
        loop.step()
        assert_same_training(twins.mine, loop)


@FORMULATIONS
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("low", [{}, {"momentum_dtype": INT8, "stochastic_rounding": True}], ids=str)
@FLOAT_DTYPES
def test_formulations_are_the_cpus(dtype, low, on_device, options):
    """Also while lr changes. On the device it is read by the host: coefficients are computed from several numbers."""
    twins = twins_of(dtype=dtype, oracle=FusedMomentum, **options, **low)
    group, other = twins.mine.param_groups[0], twins.theirs.param_groups[0]
    for step, lr in enumerate([0.1, 0.05, 0.2, 0.01]):
        group["lr"] = cuda(torch.tensor(lr, dtype=FP64)) if on_device else lr
        group["weight_decay"] = cuda(torch.tensor(lr / 10, dtype=FP64)) if on_device else lr / 10
        other.update(lr=lr, weight_decay=lr / 10)
        twins.step(COUNTED if low else ONE_LAUNCH, missing=range(5, 9) if step == 1 else (), reads=2 * on_device)


@FORMULATIONS
def test_formulations_when_steps_overflow(options):
    twins = twins_of(**options)
    for overflows in (True, True, False, True, False):
        twins.scaled_step(overflows)


@real
def test_a_formulation_is_changed():
    twins = twins_of(oracle=FusedMomentum, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for formulation in ("torch", "classical", "classical", "torch", "torch"):
        twins.edit(formulation=formulation)
        twins.new_grads()
        twins.step_as_is()


@pytest.mark.parametrize("grad_dtype", HALVES, ids=dtype_name)
def test_low_precision_gradients(grad_dtype):
    twins = twins_of([(5001,), (33, 7)])
    for _ in range(2):
        for index, (mine, theirs) in enumerate(twins.params):
            mine.grad_dtype = theirs.grad_dtype = None  # any
            twins.set_grad(index, nonzero(theirs, grad_dtype))
        twins.step_as_is()


def layouts():
    image = torch.randn(8, 6, 10, 10)
    return {
        "channels_last": (image.contiguous(memory_format=torch.channels_last), lambda g: g),
        "column": (image[:, 2], lambda g: in_layout(g, "column")),
        "every other": (torch.randn(30, 100)[:, 5:85:2], lambda g: g),
        "transposed gradient": (image[0, 0].clone(), lambda g: g.t().contiguous().t()),
        "unaligned": (image.flatten()[1:4000], lambda g: in_layout(g, "offset")),
        "expanded gradient": (image[0].clone(), lambda g: g[:1].expand(6, 10, 10)),
    }


@pytest.mark.parametrize("case", layouts())
def test_layouts(case):
    value, place = layouts()[case]
    twins = Twins([value], Oracle, **FULL)
    param = twins.params[0][0]
    whole = torch.as_strided(cpu(param), (param.untyped_storage().nbytes() // 4,), (1,), 0) if IS_EMULATION else None
    before = None if whole is None else whole.clone()
    for _ in range(3):
        twins.set_grad(0, place(nonzero(param.shape)))
        twins.step_as_is()
    if whole is not None:  # nothing beside it was written
        before.as_strided(param.shape, param.stride(), param.storage_offset()).copy_(cpu(param))
        assert_same(whole, before)


@real
def test_layouts_of_complex_tensors():
    twins = Twins([torch.randn(33, 7, dtype=torch.complex64)], FusedMomentum, **FULL)
    for _ in range(3):
        twins.step()


@pytest.mark.parametrize("count, num_groups, expected", [(200, 40, [(0, 32760)]), (3000, 30, 3)])
def test_groups_and_long_lists(count, num_groups, expected):
    values = [torch.randn(1 + i * 37 % 300) for i in range(count)]
    groups = [{"params": values[i::num_groups], "lr": 0.1 * 0.9**i} for i in range(num_groups)]
    for i, group in enumerate(groups):
        group |= {"momentum": 0.9 * (i % 3 != 0), "weight_decay": 0.1 * (i % 2)}
    twins = Twins(groups, lr=0.1, dampening=0.5)
    for _ in range(3):
        twins.step(expected)
        for opt in twins.optimizers:
            for group in opt.param_groups:
                group["lr"] *= 0.7


@pytest.mark.parametrize("count, expected", [(1, 1), (1020, 1), (1021, 1), (1022, 2), (5000, 5)])
def test_long_lists_take_few_launches(count, expected):
    twins_of([(4,)] * count).step(expected)


@real
def test_more_than_2_to_the_31_elements():
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < numel * 2 * 3 * 1.1:
        pytest.skip("needs 14 GB of GPU memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=BF16, device="cuda"))
    param.grad = torch.ones_like(param)
    FusedMomentum([param], lr=0.5, momentum=0.9).step()
    assert bool((param[-7:] == 0.5).all()) and bool((param[:7] == 0.5).all())
    assert param.detach().min().item() == 0.5 == param.detach().max().item()


# ------------------------------------------------------------------------------------------- low-precision state

LOW_SHAPES = [(1,), (8,), (257,), (64, 33), (), (0,), (5000,), (6, 5, 7, 3)]
MASTERS = [(FP32, False), (FP64, False), *((dtype, master) for dtype in HALVES for master in (False, True)), (BF16, 24)]


@pytest.mark.parametrize("stochastic_rounding", [None, False, True])
@pytest.mark.parametrize("momentum_dtype", [None, FP32, BF16, FP16, INT8, FP8, INT4], ids=dtype_name)
@pytest.mark.parametrize("dtype, master_weights", MASTERS, ids=str)
def test_low_precision_state_is_the_cpus(dtype, master_weights, momentum_dtype, stochastic_rounding):
    """Gradients of other dtypes, and some that are not there, in between."""
    options = {**FULL, "momentum_dtype": momentum_dtype, "master_weights": master_weights}
    options |= {"stochastic_rounding": stochastic_rounding, "rounding_seed": 12345678901}
    at_random = stochastic_rounding or (stochastic_rounding is None and master_weights == 24)
    twins = twins_of(LOW_SHAPES, dtype, FusedMomentum, **options)
    for missing, grad_dtype in (((), None), ((5, 6, 7), FP32), ((), BF16), ((), None)):
        if dtype is FP64 and grad_dtype is not None:
            continue
        for index, (mine, theirs) in enumerate(twins.params):
            mine.grad_dtype = theirs.grad_dtype = None  # any
            twins.set_grad(index, None if index in missing else nonzero(theirs, grad_dtype))
        twins.step_ours(COUNTED if at_random else ONE_LAUNCH)
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("momentum_dtype", [None, INT8, FP8, INT4], ids=dtype_name)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_low_precision_state_after_overflows(dtype, momentum_dtype):
    """State that a first step made before it overflowed is that of a step that is still to come."""
    options = {**FULL, "momentum_dtype": momentum_dtype, "master_weights": True}
    twins = twins_of(LOW_SHAPES, dtype, FusedMomentum, **options)

    def state():
        return [{key: cpu(value).clone() for key, value in twins.mine.state[p].items()} for p in params_of(twins.mine)]

    for _ in range(2):
        twins.scaled_step(True)
        for entry, (mine, _) in zip(state(), twins.params, strict=True):
            if "master_param" in entry:
                assert_same(entry.pop("master_param"), cpu(mine).float())
            assert not any(value.view(-1).view(torch.uint8).any() for value in entry.values())
    for _ in range(2):
        twins.scaled_step(False)
    kept = state()
    twins.scaled_step(True)
    for found, wanted in zip(state(), kept, strict=True):
        assert_all_same(found.values(), wanted.values())


@pytest.mark.parametrize("momentum_dtype", [BF16, INT8, INT4], ids=dtype_name)
@pytest.mark.parametrize("dtype", [FP32, *HALVES], ids=dtype_name)
def test_low_precision_layouts_and_averages(dtype, momentum_dtype):
    values = [torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last), in_layout(torch.randn(30, 40), "column")]
    options = {"momentum_dtype": momentum_dtype, "master_weights": True, "stochastic_rounding": True}
    values = [value.to(dtype) for value in (*values, torch.randn(20, 30))]
    twins = Twins(values, FusedMomentum, **FULL, **options, ema_decay=0.75)
    for _ in range(3):
        twins.new_grads()
        twins.set_grad(2, nonzero((30, 20), dtype).t())
        twins.both(lambda opt: opt.step())
        if dtype is FP32:
            twins.check()
        else:  # torch's lerp follows the step on the CPU where tensors lie differently
            assert_all_same([cpu(mine) for mine, _ in twins.params], [theirs for _, theirs in twins.params])


def test_a_buffer_that_is_converted_before_its_first_step():
    twins = twins_of(LOW_SHAPES, FP32, FusedMomentum, **FULL, momentum_dtype=BF16)
    twins.scaled_step(True)
    twins.edit(momentum_dtype=FP16)
    for _ in range(2):
        twins.scaled_step(False, reads=None)


@pytest.mark.parametrize("momentum_dtype", [None, BF16, INT8, FP8, INT4], ids=dtype_name)
@pytest.mark.parametrize("dtype, master_weights", MASTERS, ids=str)
def test_update_report_is_the_cpus(dtype, master_weights, momentum_dtype):
    options = {"momentum_dtype": momentum_dtype, "master_weights": master_weights}
    for rule in ({"nesterov": True, "weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}):
        values = [torch.randn(shape).to(dtype) for shape in LOW_SHAPES]
        values.append(in_layout(torch.randn(30, 40).to(dtype), "column"))
        twins = Twins(values, FusedMomentum, lr=1.0, momentum=0.9, **rule, **options)
        twins.new_grads()
        twins.both(lambda opt: opt.step())
        for lr in (1e-3, 1e-5, 1e-7, 1e-16):
            twins.edit(lr=lr)
            assert twins.mine.update_report() == twins.theirs.update_report()
        assert twins.mine.update_report()[0].updates > 7000


def test_update_report_of_numbers_on_the_device():
    twins = twins_of([4000], BF16, FusedMomentum, lr=2e-3, momentum=0.9, nesterov=True)
    twins.mine.param_groups[0]["lr"] = cuda(torch.tensor(2e-3))
    twins.scaled_step(False)
    row, expected = twins.mine.update_report()[0], twins.theirs.update_report()[0]
    assert row == expected and 0 < row.below < row.updates == 4000


ROUNDED_AT_RANDOM = pytest.mark.parametrize(
    "dtype, options",
    [
        (BF16, {"stochastic_rounding": True}),
        (FP32, {"stochastic_rounding": True, "momentum_dtype": FP16}),
        (BF16, {"stochastic_rounding": True, "momentum_dtype": INT8, "master_weights": True}),
        (BF16, {"master_weights": 24}),
    ],
    ids=str,
)


@ROUNDED_AT_RANDOM
def test_rounding_at_random_is_captured(dtype, options):
    """Replays and steps by turns round as so many steps on the CPU; a checkpoint knows how many there were."""
    twins = twins_of(LOW_SHAPES, dtype, FusedMomentum, **FULL, **options, rounding_seed=3)
    twins.step()

    def new_values():
        for mine, theirs in twins.params:
            theirs.grad = nonzero(theirs)
            cpu(mine.grad).copy_(theirs.grad) if IS_EMULATION else mine.grad.copy_(theirs.grad)

    new_values()
    replay = captured(twins.mine.step)
    twins.theirs.step()
    twins.check()
    for action in (replay, replay, twins.mine.step, twins.mine.step, replay):
        new_values()
        action()
        twins.theirs.step()
        twins.check()
    assert [counts_of(opt)[1] for opt in twins.optimizers] == [7, 7]
    if "momentum_dtype" not in options and "master_weights" not in options:  # emulated devices have no views of dtypes
        twins.mine.load_state_dict(twins.mine.state_dict())
        assert twins.mine.param_groups[0]["rounding_step"] == 7
        twins.step()


@ROUNDED_AT_RANDOM
def test_a_count_that_is_not_on_the_device_is_not_captured(dtype, options):
    twins = twins_of(LOW_SHAPES, dtype, FusedMomentum, **{**FULL, "momentum": 0, "dampening": 0}, **options)
    if "momentum_dtype" in options or "master_weights" in options:
        twins.edit(stochastic_rounding=False)
        twins.step()  # its state is there
        twins.edit(stochastic_rounding=options.get("stochastic_rounding"))
    twins.new_grads()
    before = [cpu(p).clone() for p, _ in twins.params]
    with pytest.raises(RuntimeError, match=r"captured.*count of steps.*run one step before the capture"), capturing():
        twins.mine.step()
    assert_all_same([cpu(p) for p, _ in twins.params], before)
    twins.step_as_is()


def test_a_step_that_is_left_out_counts_for_rounding_at_random():
    """And one without gradients there; on each device that rounds so."""
    twins = twins_of(LOW_SHAPES, BF16, FusedMomentum, DEVICES[:2], **FULL, stochastic_rounding=True)
    twins.scaled_step(False, reads=None)
    twins.scaled_step(True, reads=None)
    twins.theirs.zero_grad()
    twins.theirs.step()  # without gradients
    for missing in ((), range(0, 8, 2), range(1, 8, 2), ()):
        twins.step(missing=missing, reads=None)
    assert twins.mine.state_dict()["param_groups"][0]["rounding_step"] == 6


def test_a_first_step_of_low_precision_state_is_not_captured():
    twins = twins_of(LOW_SHAPES, FP32, FusedMomentum, **FULL, momentum_dtype=INT8)
    twins.new_grads()
    says = r"state is not stored yet.*run one step before the capture"
    with pytest.raises(RuntimeError, match=says), capturing():
        twins.mine.step()
    twins.step_as_is()
    with capturing():
        twins.mine.step()


# ------------------------------------------------------------------------------------- nothing waits, everything graphs


@EXACT_DTYPES
def test_numbers_on_the_device_are_not_read_by_the_host(dtype):
    on = DEVICES[-1]
    twins = twins_of(dtype=FP32, devices=[on], lr=0.1, momentum=0.9, weight_decay=0.01)
    group, other = twins.mine.param_groups[0], twins.theirs.param_groups[0]
    for lr, momentum, decay in ((0.1, 0.9, 0.01), (0.05, 0.81, 0.0), (0.025, 0.5, 0.3)):
        values = {"lr": lr, "momentum": momentum, "weight_decay": decay}
        values = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
        other.update({name: value.item() for name, value in values.items()})
        for name, value in values.items():
            if isinstance(group[name], torch.Tensor):
                group[name].copy_(cuda(value, on))
            else:
                group[name] = cuda(value, on)
        twins.step([(on, 4096)])


@emulated
@pytest.mark.parametrize("devices", [[CPU], [0, CPU], [2]], ids=str)
def test_numbers_of_another_device_are_read_by_the_host(devices):
    twins = twins_of(devices=devices, lr=0.1, momentum=0.9)
    twins.mine.param_groups[0]["lr"] = cuda(torch.tensor(0.1, dtype=FP64), 1)
    launches()
    twins.new_grads()
    twins.step_as_is()
    assert launches()[1] > 0


@real
@pytest.mark.parametrize("average", [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "ema_warmup": True}], ids=str)
def test_a_captured_step_replays_with_another_lr(average):
    """With a clipping and averages in the same graph."""
    twins = twins_of(oracle=FusedMomentum, **FULL, **average)
    lr = torch.tensor(0.1, device="cuda")
    twins.mine.param_groups[0]["lr"] = lr
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    twins.new_grads()
    grads = [param.grad for param in params_of(twins.mine)]  # those that the graph reads
    with torch.cuda.stream(side):
        for opt in twins.optimizers:
            opt.clip_grad_norm_(0.5)
            opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = twins.mine.clip_grad_norm_(0.5)
        twins.mine.step()
    for value in (0.1, 0.05, 0.5):
        lr.fill_(value)
        twins.theirs.param_groups[0]["lr"] = lr.item()
        for grad, (_, theirs) in zip(grads, twins.params, strict=True):
            theirs.grad = nonzero(theirs)
            grad.copy_(theirs.grad)
        graph.replay()
        torch.testing.assert_close(norm.cpu(), twins.theirs.clip_grad_norm_(0.5), rtol=1e-6, atol=0)
        twins.theirs.step()
    twins.check_close(1e-6, 1e-6)


def test_a_capture_needs_buffers_and_what_outlives_it():
    twins = twins_of()
    twins.new_grads()
    says = r"param_groups\[0\]\['params'\]\[0\].*run one step before the capture"
    with pytest.raises(RuntimeError, match=says), capturing():
        twins.mine.step()
    twins.step_as_is()
    twins.new_grads()
    with pytest.raises(RuntimeError, match="run one step before the capture"), capturing():
        twins.mine.clip_grad_norm_(1.0)
    twins.mine.clip_grad_norm_(1e6)
    twins.step_as_is()
    twins.new_grads()
    with capturing():
        twins.mine.clip_grad_norm_(1e6)
        twins.mine.step()
    if IS_EMULATION:
        twins.theirs.step()
        twins.check()


@real
def test_the_current_stream_is_used():
    twins = twins_of([(1 << 22,)])
    stream = torch.cuda.Stream()
    twins.new_grads()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        twins.params[0][0].grad.mul_(2)  # the step must come after it
        twins.mine.step()
    stream.synchronize()
    twins.params[0][1].grad.mul_(2)
    twins.theirs.step()
    twins.check()


@pytest.mark.parametrize("devices", [[*DEVICES[:2], CPU], [CPU, *DEVICES], [DEVICES[-1]]], ids=str)
def test_several_devices_and_the_cpu(devices):
    twins = twins_of(SHAPES * 3, devices=devices, lr=0.1, momentum=0.9)
    for missing in ((), range(20, 30), (), range(4, 9), ()):
        launches() if IS_EMULATION else None
        twins.new_grads(missing)
        twins.step_as_is()
        if IS_EMULATION:
            assert {device for device, _ in launches()[0]} == set(devices) - {CPU}


# --------------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("on", DEVICES[:2])
def test_an_overflow_on_the_first_step_changes_nothing(on):
    twins = twins_of()
    for step, overflows in enumerate((True, True, False, False, False)):
        # Two overflows and the step after them are followed by the record of it.
        twins.scaled_step(overflows, on=on, expected=2 if step < 3 else 1)
    twins.step()
    for overflows in (True, False):
        twins.scaled_step(overflows)


def test_an_overflow_when_tensors_begin_at_different_times():
    twins = twins_of([(9,), (8,), (7,)])
    for rounds, overflows in enumerate([True, True, False, True, False, False]):
        twins.scaled_step(overflows, None, missing=range(min(rounds + 1, 3), 3))


@pytest.mark.parametrize("present", [[0], [1], [0, 2], [2]])
def test_an_overflow_on_a_first_step_waits_for_its_gradient(present):
    """Another tensor's first step, of the same or of a later cohort, is not that of one without a gradient."""
    twins = twins_of([(9,), (8,), (7,)])
    for which, overflows in [
        ([0, 1], True),
        ([0, 1, 2], True),
        (present, False),
        (present, False),
        ([1], True),
        ([0, 1, 2], False),
        ([0, 1, 2], True),
        ([0, 1, 2], False),
    ]:
        twins.new_grads(missing={0, 1, 2} - set(which))
        twins.mine.found_inf = cuda(torch.tensor(float(overflows)))
        twins.mine.step()
        if not overflows:
            twins.theirs.step()
        assert_all_same([cpu(mine) for mine, _ in twins.params], [theirs for _, theirs in twins.params])
    twins.check()


ROWS = ((2, 64), (3, 32), (1, 96))  # codes leave as they are: an emulated device has none of torch's operators


@pytest.mark.parametrize("low", [{}, {"momentum_dtype": INT8}], ids=str)
def test_an_overflow_leaves_no_buffers_that_leave(low):
    twins = twins_of(ROWS, BF16 if low else FP32, FusedMomentum, **FULL, **low)
    twins.scaled_step(True)
    assert len(twins.mine.state) == len(ROWS)
    assert all("momentum_scale" in entry for entry in twins.mine.state.values()) or not low
    assert not any(twins.mine.state_dict()["state"].values())
    assert len(twins.mine.state) == len(ROWS)  # who only looks changes nothing
    twins.scaled_step(False)
    assert len(twins.mine.state_dict()["state"]) == len(ROWS)
    twins.step()

    twins = twins_of(ROWS, BF16 if low else FP32, FusedMomentum, **FULL, **low)
    twins.scaled_step(True)
    for opt in twins.optimizers:  # the plan is built anew
        del opt.param_groups[0]["params"][1:]
    twins.scaled_step(False, reads=None)


def test_an_overflow_is_read_where_the_cpu_must_know():
    twins = twins_of(devices=[0, CPU])
    for overflows in (True, False, True, False):
        twins.new_grads()
        twins.mine.found_inf = cuda(torch.tensor(float(overflows)))
        twins.mine.step()
        if not overflows:
            twins.theirs.step()
            twins.check()


@real
@pytest.mark.parametrize("order", ["step", "clip", "constructor"])
@pytest.mark.parametrize("kind", [momentum_ext.GradScaler, torch.amp.GradScaler], ids=["ours", "torchs"])
def test_scaler_and_clipping(order, kind):
    """A training of a model, as with torch's scaler and clipping around its for-loop on the device."""
    extra = {"max_grad_norm": 0.5} if order == "constructor" else {}
    model = torch.nn.Linear(64, 64).cuda()
    other = copy.deepcopy(model)
    ours, loop = FusedMomentum(model.parameters(), **FULL, **extra), for_loop(other.parameters(), **FULL)
    scalers = [each("cuda", init_scale=2.0**10, growth_interval=2) for each in (kind, torch.amp.GradScaler)]
    for step in range(8):
        data = torch.randn(8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        data = data * (float("inf") if step in (0, 3) else 1.0)
        for net, optimizer, scaler in ((model, ours, scalers[0]), (other, loop, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(net(data).sum()).backward()
            if order != "step" and (optimizer is loop or order == "clip"):
                scaler.unscale_(optimizer)
                if optimizer is ours:
                    optimizer.clip_grad_norm_(0.5)
                else:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            with no_waiting(reads=0 if step > 4 and optimizer is ours and kind is momentum_ext.GradScaler else 1):
                scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["step", "unscale", "unscale-then-clip", "constructor", "clip-first"])
@pytest.mark.parametrize("overflow_at", [(), (0, 1, 4)], ids=str)
def test_our_scaler_reads_nothing(order, overflow_at):
    """What momentum_ext.GradScaler does in unscale_() and step(), without torch's own bookkeeping on the device."""
    own = {"max_grad_norm": 0.5} if order == "constructor" else {}
    twins = twins_of([(5,), (64, 33), (3, 0), (9000,)], mine=own, **FULL)
    opt, scaler, scale = twins.mine, momentum_ext.GradScaler("cpu"), 1024.0
    unscales = "unscale" in order
    extra = {"unscale-then-clip": 1, "constructor": 1, "clip-first": 2}.get(order, 0)
    for step in range(8):
        twins.new_grads()
        for mine, theirs in twins.params:
            grad = theirs.grad * scale
            mine.grad = cuda(grad.fill_(float("inf")) if step in overflow_at else grad)
        before = [cpu(mine).clone() for mine, _ in twins.params]
        inv_scale, scale_on_device = cuda(torch.tensor(1 / scale if unscales else 1.0)), cuda(torch.tensor(scale))
        # One pass of the norm, one of the step, and what is drawn from the norm without a pass.
        with no_waiting(2 + extra if step > 5 else None):
            if order == "clip-first":
                opt.clip_grad_norm_(0.5 * scale)
            (found_inf,) = scaler._unscale_grads_(opt, inv_scale, None, not unscales).values()
            if order == "unscale-then-clip":
                opt.clip_grad_norm_(0.5)
            opt.found_inf, opt.grad_scale = found_inf, None if unscales else scale_on_device
            opt.step()
        del opt.found_inf, opt.grad_scale
        assert not is_clipping(opt)
        assert (cpu(found_inf) != 0) == (step in overflow_at)
        if step in overflow_at:
            assert all(torch.equal(cpu(mine), old) for (mine, _), old in zip(twins.params, before, strict=True))
        else:
            if order not in ("step", "unscale"):
                torch.nn.utils.clip_grad_norm_(params_of(twins.theirs), 0.5)
            twins.theirs.step()
        twins.check_params(1e-6, 1e-6)


# ------------------------------------------------------------------------------------------ clipping and averages


@FLOAT_DTYPES
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norm(norm_type, dtype):
    """It stays on the device, and has the same bits each time."""
    on = DEVICES[-1]
    twins = twins_of([*SHAPES, (300_001,)], dtype, devices=[on], lr=0.1)
    twins.new_grads()
    opt = twins.mine
    opt.clip_grad_norm_(1.0, norm_type)
    with no_waiting([(on, 4096)]):
        norm = opt.clip_grad_norm_(1.0, norm_type)
    assert (norm.dtype, norm.shape, norm.device) == (dtype, (), torch.device(f"cuda:{on}"))
    norms = set()
    for _ in range(5):
        opt.zero_grad()
        for mine, theirs in twins.params:
            mine.grad = cuda(theirs.grad.clone(), on)
        norms.add(cpu(opt.clip_grad_norm_(1.0, norm_type)).item())
    (found,) = norms
    grads = torch.cat([param.grad.double().reshape(-1) for param in params_of(twins.theirs)])
    expected = torch.linalg.vector_norm(grads, norm_type).to(dtype).item()
    assert found == pytest.approx(expected, rel=max(1e-12, torch.finfo(dtype).eps))


@pytest.mark.parametrize("value", [1e30, 1e-40])
def test_norm_range(value):
    twins = twins_of([(10_000,)], lr=0.1)
    twins.set_grad(0, torch.full((10_000,), value))
    norm = cpu(twins.mine.clip_grad_norm_(1.0)).item()
    assert norm == pytest.approx(100 * twins.params[0][1].grad[0].item(), rel=1e-6)


@pytest.mark.parametrize("how", ["call", "twice", "constructor"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clip_and_step(how, max_norm):
    twins = twins_of(oracle=FusedMomentum)
    for opt in twins.optimizers if how == "constructor" else ():
        opt.max_grad_norm = max_norm
    for _ in range(4):
        twins.new_grads()
        given = [cpu(mine.grad).clone() for mine, _ in twins.params]
        factors = {"call": [1.0], "twice": [2.0, 1.0], "constructor": []}[how]
        with no_waiting(3 if how == "twice" else 2):
            for factor in factors:
                twins.mine.clip_grad_norm_(max_norm * factor)
            twins.mine.step()
        for factor in factors:
            twins.theirs.clip_grad_norm_(max_norm * factor)
        twins.theirs.step()
        assert_all_same([cpu(mine.grad) for mine, _ in twins.params], given)
        twins.check_params(1e-6, 1e-7)


def test_clip_and_step_without_its_gradients():
    """What becomes of a clipping whose gradients are replaced, written, or zeroed."""
    twins = twins_of([(9,), (70,)], lr=0.1)
    for change in ("replaced", "zeroed", "written", "none"):
        twins.new_grads()
        twins.mine.clip_grad_norm_(1e-3)
        if change == "written":
            twins.params[1][0].grad.zero_()
            with pytest.raises(RuntimeError, match="zero_grad"):
                twins.mine.step()
            twins.mine.zero_grad()
            continue
        if change != "replaced":
            twins.both(lambda opt: opt.zero_grad())
        twins.new_grads() if change != "none" else None
        twins.step_as_is()


@real
def test_clip_and_step_with_gradients_that_come_and_go():
    """Against torch's clipping in place, with the same actions; several coefficients live at once."""
    twins = twins_of([(5,), (70,), (9,)], lr=0.1)

    def clip(max_norm):
        twins.mine.clip_grad_norm_(max_norm)
        torch.nn.utils.clip_grad_norm_(params_of(twins.theirs), max_norm)

    twins.new_grads(scale=5.0)
    clip(1.0)
    twins.set_grad(0, torch.full((5,), 3.0))
    clip(0.5)  # of two coefficients
    kept = [param.grad for param in twins.params[2]]
    twins.set_grad(2, None)
    clip(0.25)
    for param, grad in zip(twins.params[2], kept, strict=True):
        param.grad = grad
    twins.both(lambda opt: opt.step())
    twins.check_params(1e-5, 1e-6)


def test_norm_that_is_not_finite():
    twins = twins_of([(9,), (70,)], lr=0.1)
    twins.new_grads()
    twins.set_grad(1, torch.full((70,), float("nan")))
    with no_waiting(reads=1), pytest.raises(RuntimeError, match="non-finite"):
        twins.mine.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert cpu(twins.mine.clip_grad_norm_(1.0)).isnan()


def test_norm_of_several_devices_is_the_hosts():
    twins = twins_of([(9,), (9,)], devices=[CPU, 0], lr=0.1)
    twins.new_grads()
    assert norm_in_double(twins.mine) is None


def test_clip_and_step_that_fails_keeps_the_clipping_before_it():
    twins = twins_of([(9,), (70,)], oracle=FusedMomentum, lr=0.1)
    twins.step()
    twins.new_grads()
    for opt in twins.optimizers:
        opt.max_grad_norm = 0.25
        opt.clip_grad_norm_(0.5)
    before = [cpu(mine).clone() for mine, _ in twins.params]
    twins.mine.param_groups[0]["formulation"] = "none"
    with pytest.raises(ValueError, match="formulation"):
        twins.mine.step()
    assert_all_same([cpu(mine) for mine, _ in twins.params], before)
    twins.mine.param_groups[0]["formulation"] = "torch"
    twins.both(lambda opt: opt.step())
    twins.check_params(1e-6, 1e-7)


WARMUP = pytest.mark.parametrize("warmup", [False, True])


def averaged_twins(warmup, decay=0.75, **options):
    return twins_of(oracle=FusedMomentum, **{**FULL, "ema_decay": decay, "ema_warmup": warmup, **options})


@WARMUP
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=dtype_name)
def test_averages_in_the_same_launch(dtype, warmup):
    twins = averaged_twins(warmup, 0.9, dtype=dtype)
    for _ in range(12):
        twins.step(1 + warmup)
    assert twins.mine.state_dict()["param_groups"][0]["ema_step"] == 12


@WARMUP
def test_averages_when_the_device_finds_an_overflow(warmup):
    twins = averaged_twins(warmup)
    for overflows in (True, True, False, False, True, False, False):
        twins.scaled_step(overflows, None)
    for _ in range(2):  # goes on without the scaler
        twins.step()
    assert twins.mine.state_dict()["param_groups"][0]["ema_step"] == 6


@pytest.mark.parametrize("overflows", [False, True])
def test_averages_of_tensors_without_a_gradient(overflows):
    twins = averaged_twins(True)
    for step, missing in enumerate([range(4, 10), (), [0, *range(2, 10)], (), range(5, 10), ()]):
        if overflows:
            twins.scaled_step(step in (0, 3), None, missing=missing, reads=None)
        else:
            twins.step(missing=missing, reads=None)


def test_averages_of_layouts():
    values = [torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last), torch.randn(16, 16)]
    twins = Twins(values, Oracle, **FULL, ema_decay=0.75)
    for _ in range(3):
        twins.new_grads()
        twins.set_grad(1, nonzero((16, 16)).t())
        twins.step_as_is()


@emulated
def test_averages_whose_count_comes_back_where_a_step_cannot_stay_on_one_device():
    twins = averaged_twins(True)
    for step in range(6):
        if step == 3:
            move(twins, 1, 1)
        twins.new_grads()
        twins.step_as_is()
    assert twins.mine.state_dict()["param_groups"][0]["ema_step"] == 6


# ------------------------------------------------------------------------------------------- between steps, errors


def move(twins, index, device):
    """A parameter and its state, to other memory there."""
    param = twins.params[index][0]
    param.grad = None
    param.data = cuda(cpu(param).clone(), device)
    state = twins.mine.state[param]
    state.update({name: cuda(cpu(value).clone(), device) for name, value in state.items()})


def test_what_changes_between_steps():
    twins = twins_of()
    twins.step()
    for index in range(len(SHAPES)):  # other memory, and other devices
        move(twins, index, DEVICES[index % len(DEVICES)])
    for _ in range(2):
        twins.new_grads()
        twins.step_as_is()
        twins.both(lambda opt: opt.state.clear())


@real
def test_state_dicts_go_to_torch_and_back():
    twins = twins_of(oracle=for_loop)
    twins.step()
    twins.step()
    params = [torch.nn.Parameter(theirs.detach().cuda()) for _, theirs in twins.params]
    loop = for_loop(params, **FULL)
    loop.load_state_dict(copy.deepcopy(twins.mine.state_dict()))
    twins.mine.load_state_dict(copy.deepcopy(loop.state_dict()))
    twins.step()
    for param, (mine, _) in zip(params, twins.params, strict=True):
        param.grad = mine.grad.clone()
    loop.step()
    assert_same_training(twins.mine, loop)
    assert copy.deepcopy(twins.mine).state_dict()["state"].keys() == loop.state_dict()["state"].keys()


@real
def test_sparse_gradients_take_torchs_path():
    pair = Pair([torch.randn(10, 4)], lr=0.1)
    param = pair.params[0][0]
    param.data = param.data.cuda()
    grad = torch.sparse_coo_tensor([[1, 5]], torch.randn(2, 4), (10, 4))
    param.grad, pair.params[0][1].grad = grad.cuda(), grad
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA kernels")
        pair.mine.step()
    pair.theirs.step()
    assert_same(param.cpu(), pair.params[0][1])


# ---------------------------------------------------------------------------------------------------------- DTensors


@pytest.fixture
def mesh():
    """Of one process. An emulated device has no backend of its own: its mesh is the CPU's."""
    with one_process_group():
        yield init_device_mesh("cpu" if IS_EMULATION else "cuda", (1,))


class Sharded(Twins):
    """Parameters on the device as local shards of DTensors, and a plain one."""

    def __init__(self, mesh, shapes, **hyper):
        self.mesh = mesh
        super().__init__([torch.randn(shape) for shape in shapes], **hyper)
        params = self.mine.param_groups[0]["params"]
        params[:-1] = [self.shard_of(param).requires_grad_() for param in params[:-1]]

    def shard_of(self, tensor):
        meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
        spec = DTensorSpec(self.mesh, (Shard(0),), tensor_meta=meta)
        return DTensor(tensor.detach(), spec, requires_grad=False)

    def get(self, tensor):
        return cpu(local(tensor.detach()))

    def new_grads(self, missing=()):
        super_put, self.put = self.put, lambda tensor, device: tensor
        try:
            for index, (mine, theirs) in enumerate(self.params):
                grad = self.random_like(theirs)
                theirs.grad = None if index in missing else grad
                placed = cuda(grad.clone())
                placed = self.shard_of(placed) if isinstance(mine, DTensor) else placed
                mine.grad = None if index in missing else placed
        finally:
            self.put = super_put


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True, "dampening": 0.0}, {"ema_decay": 0.9}, {"momentum_dtype": "bfloat16"}], ids=str
)
def test_dtensors_are_stepped_as_their_shards(mesh, options):
    shapes = [(8, 3), (5,), (0, 4), (2, 3, 4), (7,)]
    own = {name: options[name] for name in ("ema_decay", "momentum_dtype") if name in options}
    hyper = {**FULL, **{name: value for name, value in options.items() if name not in own}}
    twins = Sharded(mesh, shapes, mine=own, **hyper)
    if "momentum_dtype" in own:
        plain = FusedMomentum([param.detach().clone().requires_grad_() for _, param in twins.params], **hyper, **own)
    for missing in ((1,), (), (), ()):
        twins.new_grads(missing)
        with no_waiting():
            twins.mine.step()
        if "momentum_dtype" in own:
            for param, (_, theirs) in zip(params_of(plain), twins.params, strict=True):
                param.grad = theirs.grad
            plain.step()
            expected = params_of(plain)
        else:
            twins.theirs.step()
            expected = params_of(twins.theirs)
        for (mine, _), wanted in zip(twins.params, expected, strict=True):
            assert_same(twins.get(mine), wanted.detach())
    for mine, _ in twins.params[:-1]:
        state = twins.mine.state[mine]
        assert set(state) == {"momentum_buffer"} | ({"ema"} if "ema_decay" in own else set())
        assert all(isinstance(value, DTensor) and local(value).is_cuda for value in state.values())


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_norms_of_dtensors(mesh, norm_type):
    """They wait for the device, because other ranks must know what this one has found."""
    twins = Sharded(mesh, [(8, 3), (5,), (7,)], **FULL)
    for _ in range(3):
        twins.new_grads()
        grads = torch.cat([theirs.grad.double().flatten() for _, theirs in twins.params])
        norm = twins.mine.clip_grad_norm_(0.5, norm_type)
        torch.testing.assert_close(norm.item(), torch.linalg.vector_norm(grads, norm_type).item(), rtol=1e-6, atol=0)
        for _, theirs in twins.params:
            theirs.grad *= 0.5 / (norm.item() + 1e-6)
        twins.mine.step()
        twins.theirs.step()
        for mine, theirs in twins.params:
            torch.testing.assert_close(twins.get(mine), theirs.detach(), rtol=1e-6, atol=1e-7)


@emulated
def test_a_failed_launch_names_it_and_leaves_no_buffers():
    twins = twins_of(devices=[1])
    twins.new_grads()
    says = r"FusedMomentum.step on cuda:1: launching .*cudaErrorLaunchFailure"
    with pytest.raises(RuntimeError, match=says), failing_launches():
        twins.mine.step()
    assert not any(twins.mine.state.values())
    twins.step()


@emulated
def test_a_build_without_kernels_says_so_once(monkeypatch):
    from devices import lazy_init

    monkeypatch.setattr(momentum_ext._C, "HAS_CUDA_KERNELS", False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lazy_init)
    torchs_error = (AssertionError, RuntimeError)
    twins = twins_of([(5,)], lr=0.1, mine={"differentiable": True})  # takes torch's path, which has no CUDA here
    twins.new_grads()
    with (
        pytest.warns(UserWarning, match="built without CUDA kernels.*FORCE_CUDA=1"),
        pytest.raises(torchs_error, match="leaf Variable"),
    ):
        twins.mine.step()
    with pytest.raises(torchs_error, match="leaf Variable"):  # no second warning, which would be an error
        twins.mine.step()
