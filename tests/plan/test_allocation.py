"""Once warm, a step allocates nothing: not in torch, not on the heap, and in Python no more than a call costs."""

import ctypes
import gc
import tracemalloc

import pytest
import torch
from values import in_layout

from momentum_ext import FusedAdamW, FusedMomentum, FusedNAdam

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def momentum(params):
    return FusedMomentum(params, **HYPER)


def adamw(params):
    return FusedAdamW(params, amsgrad=True, state_dtype={"exp_avg": "float32"})


def warm(shapes, dtype=torch.float32, layout="contiguous", grad_layout="contiguous", make=momentum):
    params = [torch.nn.Parameter(in_layout(torch.randn(shape).to(dtype), layout)) for shape in shapes]
    for param in params:
        param.grad = in_layout(torch.randn(param.shape).to(dtype) * 1e-6, grad_layout)
    opt = make(params)
    for _ in range(5):
        opt.step()
    return opt


CASES = {
    "many-small": lambda: warm([(17,)] * 500),
    "large": lambda: warm([(70_001,), (300, 300), (5,)]),
    "bf16": lambda: warm([(1000,)] * 30, torch.bfloat16),
    "fp16": lambda: warm([(1000,)] * 30, torch.float16),
    "fp64": lambda: warm([(1000,)] * 30, torch.float64),
    "permuted": lambda: warm([(30, 40)] * 30, layout="permuted", grad_layout="permuted"),
    "strided": lambda: warm([(30, 40)] * 30, layout="column", grad_layout="permuted"),
    "adamw": lambda: warm([(17,)] * 500, make=adamw),
    "nadam": lambda: warm([(70_001,), (300, 300), (5,)], make=FusedNAdam),
    "complex": lambda: warm([(300,)] * 30, torch.complex64),
}


@pytest.mark.parametrize("case", CASES)
def test_torchs_allocator_is_not_called(case):
    opt = CASES[case]()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    events = [e for e in profile.events() if e.name == "[memory]" or (e.cpu_memory_usage and e.cpu_memory_usage != 0)]
    assert not events, [(e.name, e.cpu_memory_usage) for e in events]


def test_the_profiler_would_see_an_allocation():
    """The probe itself: the first step allocates buffers, and the profiler shows them."""
    param = torch.nn.Parameter(torch.randn(1000))
    param.grad = torch.randn(1000)
    opt = FusedMomentum([param], **HYPER)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert sum(e.self_cpu_memory_usage for e in profile.events()) >= 4000


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""


FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
MallocInfo._fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def heap():
    """(bytes in use, bytes obtained from the system) by glibc's own books."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd, info.arena + info.hblkhd


HAS_MALLINFO = hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not HAS_MALLINFO, reason="not glibc 2.33 or newer")
@pytest.mark.parametrize("case", CASES)
def test_the_heap_does_not_grow_over_1000_steps(case):
    opt = CASES[case]()
    gc.collect()
    gc.disable()
    try:
        heap()
        used, obtained = heap()
        for _ in range(1000):
            opt.step()
        used_after, obtained_after = heap()
    finally:
        gc.enable()
    assert used_after - used < 4096, "a leak: at least four bytes a step"
    assert obtained_after == obtained, "memory was obtained from the system"


@pytest.mark.parametrize("case", ["many-small", "strided"])
def test_python_allocates_no_more_for_more_tensors(case):
    """The peak within a step, by tracemalloc: what a Python call costs, however many tensors there are."""
    peaks = []
    for count in (5, 500):
        opt = warm([(17,)] * count) if case == "many-small" else warm([(3, 4)] * count, layout="column")
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(3):
                opt.step()
            start, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            opt.step()
            peaks.append(tracemalloc.get_traced_memory()[1] - start)
        finally:
            tracemalloc.stop()
    assert peaks[1] <= peaks[0] + 256, peaks
    assert peaks[1] < 4096, peaks


def test_python_objects_do_not_pile_up():
    opt = warm([(17,)] * 50)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(10):
            opt.step()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            opt.step()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 1000, (before, after)


def test_parameters_are_not_kept_alive():
    """Optimizer, plan and all: gone with the last reference, and their memory with them."""
    import weakref

    opt = warm([(1000,)] * 3)
    params = opt.param_groups[0]["params"]
    watched = [weakref.ref(x) for x in (opt, *params, *(opt.state[p]["momentum_buffer"] for p in params))]
    del opt, params
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_replaced_gradients_and_buffers_are_freed():
    """After the step that follows, the plan holds nothing that the user has let go of."""
    import weakref

    opt = warm([(1000,)] * 3)
    param = opt.param_groups[0]["params"][0]
    watched = [weakref.ref(x) for x in (param.grad, opt.state[param]["momentum_buffer"])]
    param.grad = torch.randn(1000)
    opt.state[param]["momentum_buffer"] = torch.randn(1000)
    opt.step()
    assert [ref() for ref in watched] == [None, None]
    gone = weakref.ref(opt.param_groups[0]["params"].pop())
    for p in list(opt.state):
        if p is gone():
            opt.state.pop(p)
    del p
    opt.step()
    gc.collect()
    assert gone() is None
