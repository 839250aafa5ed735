"""What only a GPU can show. Runs with `pytest --device cuda` (make gpu-check), where a GPU and CUDA kernels are there.

The same promises without a GPU: test_emulated_cuda.py (the binding), test_native.py (the kernels), make cuda-check.
"""

import copy
import warnings

import pytest
import torch
from harness import bits

import momentum_ext
from momentum_ext import FusedMomentum

pytestmark = pytest.mark.cuda

SHAPES = [(1,), (3, 0), (7,), (64, 33), (), (4095,), (4096,), (4097,), (300, 1001), (2, 3, 4, 5)]
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]
FULL = OPTIONS[3]


def make_params(shapes=SHAPES, dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype) * scale
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(grad)


def clones(params, device=None):
    return [torch.nn.Parameter(p.detach().clone().to(device or p.device)) for p in params]


def for_loop(params, **options):
    return torch.optim.SGD(params, foreach=False, fused=False, **options)


def same(a, b):
    (nan_a, bits_a), (nan_b, bits_b) = bits(a.detach().cpu()), bits(b.detach().cpu())
    return torch.equal(nan_a, nan_b) and torch.equal(bits_a, bits_b)


def check(ours, theirs, ours_params, theirs_params):
    for p, q in zip(ours_params, theirs_params, strict=True):
        assert same(p, q)
        b, c = (o.state.get(x, {}).get("momentum_buffer") for o, x in ((ours, p), (theirs, q)))
        assert (b is None) == (c is None)
        assert b is None or same(b, c)


# ----------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_torch_and_of_the_cpu(options, dtype):
    params = make_params(dtype=dtype)
    on_cpu, torchs = clones(params, "cpu"), clones(params)
    ours, cpus, loop = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options), for_loop(torchs, **options)
    for step in range(4):
        for each in (params, on_cpu, torchs):
            set_grads(each, step)
        for optimizer in (ours, cpus, loop):
            optimizer.step()
    check(ours, loop, params, torchs)
    check(ours, cpus, params, on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_16_bit_is_the_cpus(options, dtype):
    params = make_params(dtype=dtype)
    on_cpu = clones(params, "cpu")
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step in range(4):
        set_grads(params, step)
        set_grads(on_cpu, step)
        ours.step()
        cpus.step()
    check(ours, cpus, params, on_cpu)


FORMULATIONS = pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "formulation": formulation, **rest}
        for formulation in ("classical", "ema")
        for rest in ({}, {"nesterov": True, "decoupled_weight_decay": True, "maximize": True})
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)


@FORMULATIONS
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_formulations_are_the_cpus(dtype, on_device, options):
    """Also while lr changes, given as a number or as a tensor on the device."""
    params = make_params(dtype=dtype)
    on_cpu = clones(params, "cpu")
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step, lr in enumerate([0.1, 0.05, 0.2, 0.01]):
        ours.param_groups[0]["lr"] = torch.tensor(lr, device="cuda", dtype=torch.float64) if on_device else lr
        cpus.param_groups[0]["lr"] = lr
        set_grads(params, step)
        set_grads(on_cpu, step)
        ours.step()
        cpus.step()
        check(ours, cpus, params, on_cpu)


@FORMULATIONS
def test_formulations_when_steps_overflow(options):
    params = make_params()
    on_cpu = clones(params, "cpu")
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step, overflow in enumerate([True, True, False, True, False]):
        set_grads(params, step)
        set_grads(on_cpu, step)
        ours.found_inf = torch.tensor(float(overflow), device="cuda")
        ours.step()
        if not overflow:
            cpus.step()
            check(ours, cpus, params, on_cpu)
        assert all(same(a, b) for a, b in zip(params, on_cpu, strict=True))


def test_a_formulation_is_changed():
    params = make_params()
    on_cpu = clones(params, "cpu")
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step, formulation in enumerate(["torch", "classical", "classical", "torch", "torch"]):
        for each, optimizer in ((params, ours), (on_cpu, cpus)):
            set_grads(each, step)
            optimizer.param_groups[0]["formulation"] = formulation
            optimizer.step()
        check(ours, cpus, params, on_cpu)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients(grad_dtype):
    results = []
    for device in ("cuda", "cpu"):
        param = torch.nn.Parameter(torch.linspace(-2, 3, 5001).to(device))
        param.grad_dtype = None  # any
        param.grad = torch.linspace(-1, 1, 5001).to(grad_dtype).to(device)
        optimizer = FusedMomentum([param], **FULL)
        optimizer.step()
        optimizer.step()
        results.append(param)
    assert same(*results)


@pytest.mark.parametrize(
    "case", ["channels_last", "column", "transposed_grad", "unaligned", "expanded_grad", "complex"]
)
def test_layouts(case):
    def make(device):
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(8, 6, 10, 10, generator=generator).to(device)
        grads = torch.randn(8, 6, 10, 10, generator=generator).to(device)
        if case == "channels_last":
            return values.contiguous(memory_format=torch.channels_last), grads
        if case == "column":
            return values[:, 2], grads[:, 3]
        if case == "transposed_grad":
            return values[0, 0].clone(), grads[0, 0].t()
        if case == "unaligned":
            return values.flatten()[1:4000], grads.flatten()[2:4001]
        if case == "expanded_grad":
            return values[0].clone(), grads[0, 0].expand(6, 10, 10)
        return torch.view_as_complex(values[..., :2].contiguous()), torch.view_as_complex(grads[..., :2].contiguous())

    results = []
    for device in ("cuda", "cpu"):
        value, grad = make(device)
        param = torch.nn.Parameter(value)
        optimizer = FusedMomentum([param], **FULL)
        for _ in range(3):
            param.grad = grad
            optimizer.step()
        results.append((param, optimizer.state[param]["momentum_buffer"]))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_groups_and_long_lists():
    shapes = [(1 + i * 37 % 300,) for i in range(3000)]
    params = make_params(shapes)
    torchs = clones(params)

    def split(tensors):
        return [{"params": tensors[i::30], "lr": 0.1 * 0.9**i, "weight_decay": 0.1 * (i % 2)} for i in range(30)]

    ours, loop = FusedMomentum(split(params), momentum=0.9), for_loop(split(torchs), momentum=0.9)
    for step in range(3):
        set_grads(params, step)
        set_grads(torchs, step)
        ours.step()
        loop.step()
    check(ours, loop, params, torchs)


def test_more_than_2_to_the_31_elements():
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < numel * 2 * 3 * 1.1:
        pytest.skip("needs 14 GB of GPU memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    FusedMomentum([param], lr=0.5, momentum=0.9).step()
    assert bool((param[-7:] == 0.5).all()) and bool((param[:7] == 0.5).all())
    assert param.detach().min().item() == 0.5 == param.detach().max().item()


# ------------------------------------------------------------------------------------------- low-precision state


def same_state(one, other):
    assert set(one) == set(other)
    for name in one:
        if one[name].is_floating_point() and one[name].element_size() > 1:
            assert same(one[name], other[name]), name
        else:
            assert torch.equal(
                one[name].cpu().contiguous().view(torch.uint8), other[name].cpu().contiguous().view(torch.uint8)
            ), name


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize(
    "momentum_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize(
    "dtype, master_weights",
    [(torch.float32, False), (torch.float64, False)]
    + [(d, m) for d in (torch.bfloat16, torch.float16) for m in (False, True)],
)
def test_low_precision_state_is_the_cpus(dtype, master_weights, momentum_dtype, stochastic_rounding):
    options = {**FULL, "momentum_dtype": momentum_dtype, "master_weights": master_weights}
    options |= {"stochastic_rounding": stochastic_rounding, "rounding_seed": 12345678901}
    shapes = [shape for shape in SHAPES if shape != ()]  # a tensor of no dimension cannot be seen as bytes
    params = make_params(shapes, dtype)
    on_cpu = clones(params, "cpu")
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    on_cpu[-1].data = on_cpu[-1].data.contiguous(memory_format=torch.channels_last)
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step in range(4):
        set_grads(params, step)
        set_grads(on_cpu, step)
        ours.step()
        cpus.step()
    for p, q in zip(params, on_cpu, strict=True):
        assert same(p, q)
        same_state(ours.state[p], cpus.state[q])


@pytest.mark.parametrize("momentum_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_state_after_overflows(dtype, momentum_dtype):
    options = {**FULL, "momentum_dtype": momentum_dtype, "master_weights": True}
    params = make_params([(7,), (300, 1001)], dtype)
    on_cpu = clones(params, "cpu")
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step, overflow in enumerate([True, True, False, True, False]):
        set_grads(params, step)
        set_grads(on_cpu, step)
        ours.found_inf = torch.tensor(float(overflow), device="cuda")
        ours.step()
        if not overflow:
            cpus.step()
    for p, q in zip(params, on_cpu, strict=True):
        assert same(p, q)
        same_state(ours.state[p], cpus.state[q])


def test_low_precision_rounding_is_not_captured():
    params = make_params([(300,)], torch.bfloat16)
    set_grads(params, 0)
    optimizer = FusedMomentum(params, **FULL, stochastic_rounding=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="stochastic_rounding"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


# ------------------------------------------------------------------------------------- nothing waits, everything graphs


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_does_not_wait(on_device):
    params = make_params()
    optimizer = FusedMomentum(params, **FULL)
    for name in ("lr", "momentum", "weight_decay") if on_device else ():
        optimizer.param_groups[0][name] = torch.tensor(FULL[name], device="cuda")
    set_grads(params, 0)
    found_inf, grad_scale = torch.zeros((), device="cuda"), torch.full((), 8.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.step()
        optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
        before = [param.detach().clone() for param in params]
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(same(param, old) for param, old in zip(params, before, strict=True) if param.numel())


def test_a_captured_step_replays_with_another_lr():
    params, lr = make_params(), torch.tensor(0.1, device="cuda")
    torchs = clones(params)
    ours = FusedMomentum(params, **{**FULL, "lr": lr})
    loop = for_loop(torchs, **FULL)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for each in (params, torchs):
            set_grads(each, 0)
        ours.step()
        loop.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step, value in enumerate([0.1, 0.05, 0.5]):
        lr.fill_(value)
        loop.param_groups[0]["lr"] = lr.item()
        for each in (params, torchs):
            set_grads(each, step)
        graph.replay()
        loop.step()
    check(ours, loop, params, torchs)


def test_a_capture_of_a_first_step_is_an_error():
    params = make_params()
    set_grads(params, 0)
    optimizer = FusedMomentum(params, **FULL)
    with pytest.raises(RuntimeError, match="run one step before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_the_current_stream_is_used():
    params = make_params([(1 << 22,)])
    torchs = clones(params)
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    stream = torch.cuda.Stream()
    for each in (params, torchs):
        set_grads(each, 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for param in params:
            param.grad.mul_(2)  # the step must come after it
        ours.step()
        mine = [param.detach().clone() for param in params]
    stream.synchronize()
    for param in torchs:
        param.grad.mul_(2)
    loop.step()
    assert all(same(a, b) for a, b in zip(mine, torchs, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices_and_the_cpu():
    devices = ["cuda:1", "cuda:0", "cpu"]
    values = make_params(device="cpu")
    params = [torch.nn.Parameter(v.detach().to(devices[i % 3])) for i, v in enumerate(values)]
    torchs = [torch.nn.Parameter(v.detach().clone()) for v in values]
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    for step in range(3):
        set_grads(params, step)
        set_grads(torchs, step)
        ours.step()
        loop.step()
    assert torch.cuda.current_device() == 0
    assert all(same(a, b) for a, b in zip(params, torchs, strict=True))


def test_the_cpu_and_one_device():
    values = make_params(device="cpu")
    params = [torch.nn.Parameter(v.detach().to("cuda" if i % 2 else "cpu")) for i, v in enumerate(values)]
    torchs = [torch.nn.Parameter(v.detach().clone()) for v in values]
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    for step in range(3):
        set_grads(params, step)
        set_grads(torchs, step)
        ours.step()
        loop.step()
    assert all(same(a, b) for a, b in zip(params, torchs, strict=True))


# --------------------------------------------------------------------------------------------------------- overflow


def test_an_overflow_on_the_first_step_changes_nothing():
    params = make_params()
    torchs = clones(params)
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    scale = 1024.0
    for step, overflow in enumerate([True, True, False, True, False, False]):
        before = clones(params)
        set_grads(params, step, scale)
        set_grads(torchs, step)
        ours.found_inf = torch.tensor(float(overflow), device="cuda")
        ours.grad_scale = torch.tensor(scale, device="cuda")
        ours.step()
        if overflow:
            assert all(same(a, b) for a, b in zip(params, before, strict=True))
        else:
            loop.step()
            check(ours, loop, params, torchs)


def test_an_unstarted_buffer_does_not_leave():
    params = make_params()
    set_grads(params, 0)
    optimizer = FusedMomentum(params, **FULL)
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    assert copy.deepcopy(optimizer).state_dict()["state"] == {}


def test_grad_scaler():
    model = torch.nn.Linear(64, 64).cuda()
    other = copy.deepcopy(model)
    ours, loop = FusedMomentum(model.parameters(), **FULL), for_loop(other.parameters(), **FULL)
    ours_scaler, loop_scaler = (torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    for step in range(8):
        data = torch.randn(8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        data = data * (float("inf") if step in (0, 3) else 1.0)
        for net, optimizer, scaler in ((model, ours, ours_scaler), (other, loop, loop_scaler)):
            optimizer.zero_grad()
            scaler.scale(net(data).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert ours_scaler.get_scale() == loop_scaler.get_scale()
    check(ours, loop, list(model.parameters()), list(other.parameters()))


# ------------------------------------------------------------------------- clipping, unscaling, averages: one pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norm(norm_type, dtype):
    params = make_params([*SHAPES, (3_000_001,)], dtype)
    set_grads(params, 0)
    optimizer = FusedMomentum(params, lr=0.1)
    norms = {optimizer.clip_grad_norm_(0.0, norm_type).item()}
    for _ in range(20):
        optimizer.zero_grad()
        set_grads(params, 0)
        norms.add(optimizer.clip_grad_norm_(1.0, norm_type).item())
    assert len(norms) == 1
    grads = torch.cat([p.grad.double().reshape(-1) for p in params])
    expected = torch.linalg.vector_norm(grads, norm_type).to(dtype).item()
    assert norms.pop() == pytest.approx(expected, rel=max(1e-12, torch.finfo(dtype).eps))


@pytest.mark.parametrize("value", [1e30, 1e-40])
def test_norm_range(value):
    param = torch.nn.Parameter(torch.zeros(10_000, device="cuda"))
    param.grad = torch.full_like(param, value)
    norm = FusedMomentum([param], lr=0.1).clip_grad_norm_(1.0).item()
    assert norm == pytest.approx(100 * param.grad[0].item(), rel=1e-6)


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_clip_and_step_without_waiting(max_norm):
    params = make_params([s for s in SHAPES if 0 not in s])
    torchs = clones(params)
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    for step in range(4):
        set_grads(params, step)
        set_grads(torchs, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            norm = ours.clip_grad_norm_(max_norm)
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = torch.nn.utils.clip_grad_norm_(torchs, max_norm)
        loop.step()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for p, q in zip(params, torchs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["step", "clip", "constructor"])
@pytest.mark.parametrize("ours_scales", [True, False])
def test_scaler_and_clipping(order, ours_scales):
    extra = {"max_grad_norm": 0.5} if order == "constructor" else {}
    model = torch.nn.Linear(64, 64).cuda()
    other = copy.deepcopy(model)
    ours, loop = FusedMomentum(model.parameters(), **FULL, **extra), for_loop(other.parameters(), **FULL)
    kinds = (momentum_ext.GradScaler if ours_scales else torch.amp.GradScaler, torch.amp.GradScaler)
    scalers = [kind("cuda", init_scale=2.0**10, growth_interval=2) for kind in kinds]
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
            if step > 4 and optimizer is ours:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup", [False, True])
def test_averages_are_the_cpus(dtype, warmup):
    params = make_params(dtype=dtype)
    on_cpu = clones(params, "cpu")
    options = {**FULL, "ema_decay": 0.9, "ema_warmup": warmup}
    ours, cpus = FusedMomentum(params, **options), FusedMomentum(on_cpu, **options)
    for step, overflow in enumerate([False, True, False, False, True, False]):
        set_grads(params, step)
        set_grads(on_cpu, step)
        if step:
            ours.found_inf = torch.tensor(float(overflow), device="cuda")
            cpus.found_inf = torch.tensor(float(overflow))
        ours.step()
        cpus.step()
        for p, q in zip(params, on_cpu, strict=True):
            assert same(p, q) and same(ours.state[p]["ema"], cpus.state[q]["ema"])
    assert ours.state_dict()["param_groups"][0]["ema_step"] == 4


@pytest.mark.parametrize("warmup", [False, True])
def test_clip_step_and_average_captured(warmup):
    params, lr = make_params(), torch.tensor(0.1, device="cuda")
    twins = clones(params)
    options = {**FULL, "ema_decay": 0.9, "ema_warmup": warmup}
    captured, eager = FusedMomentum(params, **{**options, "lr": lr}), FusedMomentum(twins, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for each, optimizer in ((params, captured), (twins, eager)):
            set_grads(each, 0)
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = captured.clip_grad_norm_(0.5)
        captured.step()
    for step, value in enumerate([0.1, 0.05, 0.5]):
        lr.fill_(value)
        eager.param_groups[0]["lr"] = lr.item()
        for each in (params, twins):
            set_grads(each, step)
        graph.replay()
        expected = eager.clip_grad_norm_(0.5)
        eager.step()
        assert same(norm, expected)
    for p, q in zip(params, twins, strict=True):
        assert same(p, q) and same(captured.state[p]["ema"], eager.state[q]["ema"])


# ------------------------------------------------------------------------------------------------- the other ways


def test_sparse_gradients_take_torchs_path():
    param = torch.nn.Parameter(torch.randn(10, 4, device="cuda"))
    twin = torch.nn.Parameter(param.detach().clone())
    grad = torch.sparse_coo_tensor([[1, 5]], torch.randn(2, 4), (10, 4)).cuda()
    param.grad, twin.grad = grad, grad.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA kernels")
        FusedMomentum([param], lr=0.1).step()
    for_loop([twin], lr=0.1).step()
    assert same(param, twin)


def test_state_dicts_go_to_torch_and_back():
    params = make_params()
    torchs = clones(params)
    ours, loop = FusedMomentum(params, **FULL), for_loop(torchs, **FULL)
    for step in range(2):
        for each, optimizer in ((params, ours), (torchs, loop)):
            set_grads(each, step)
            optimizer.step()
    ours.load_state_dict(copy.deepcopy(loop.state_dict()))
    loop.load_state_dict(copy.deepcopy(ours.state_dict()))
    for each, optimizer in ((params, ours), (torchs, loop)):
        set_grads(each, 9)
        optimizer.step()
    check(ours, loop, params, torchs)


def test_coefficients_of_gradients_that_come_and_go():
    """Against torch's clipping in place, with the same actions; several coefficients live at once."""
    ours, theirs = make_params([(5,), (70,), (9,)]), make_params([(5,), (70,), (9,)])
    optimizer, sgd = FusedMomentum(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, foreach=False, fused=False)
    for params in (ours, theirs):
        set_grads(params, 1, scale=5.0)

    def clip(max_norm):
        optimizer.clip_grad_norm_(max_norm)
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)

    clip(1.0)
    for params in (ours, theirs):
        params[0].grad = torch.full((5,), 3.0, device="cuda")
    clip(0.5)  # of two coefficients
    kept = [params[2].grad for params in (ours, theirs)]
    ours[2].grad = theirs[2].grad = None
    clip(0.25)
    ours[2].grad, theirs[2].grad = kept
    optimizer.step()
    sgd.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
