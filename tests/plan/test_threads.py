"""Threads and processes: several Python threads stepping at once, forked workers, forked children that step."""

import os
import pickle
import select
import signal
import sys
import threading
import time

import pytest
import torch
from harness import Pair, assert_alike, assert_all_same, for_loop, params_of, run_python

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def run_all(jobs, timeout=60):
    """Each job in its own Python thread, all started together; their errors are raised here."""
    errors, barrier = [], threading.Barrier(len(jobs))

    def guarded(job):
        barrier.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


class Training:
    """An optimizer, gradients of each step, and the parameters as torch's for-loop leaves them."""

    def __init__(self, seed, sizes=(300, 32_001, 33, 32_003, 1, 5_001), steps=10):
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(n, generator=generator) for n in sizes]
        self.grads = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(steps)]
        self.opt = FusedMomentum([torch.nn.Parameter(v.clone()) for v in values], **HYPER)
        reference = for_loop([torch.nn.Parameter(v.clone()) for v in values], **HYPER)
        for grads in self.grads:
            give(reference, grads)
            reference.step()
        self.expected = params_of(reference)

    def drive(self, start=0, stop=None):
        for grads in self.grads[start:stop]:
            give(self.opt, grads)
            self.opt.step()

    def up_to_the_last(self):
        self.drive(0, -1)
        give(self.opt, self.grads[-1])

    def check(self):
        assert_all_same(params_of(self.opt), self.expected)


def give(opt, grads):
    for param, grad in zip(params_of(opt), grads, strict=True):
        param.grad = grad.clone()


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("sizes", [(300, 33, 5), (300, 32_001, 33, 32_003, 1, 5_001)], ids=["small", "large"])
def test_optimizers_in_several_python_threads(count, sizes):
    trainings = [Training(seed, sizes, steps=30) for seed in range(count)]
    run_all([training.drive for training in trainings])
    for training in trainings:
        training.check()


def test_one_optimizer_handed_from_thread_to_thread():
    training = Training(0)
    for step in range(10):
        run_all([lambda step=step: training.drive(step, step + 1)])
    training.check()


@pytest.mark.parametrize("size", [70_001, 3_000_000], ids=["small", "gil-released"])
def test_one_optimizer_stepped_by_several_threads_at_once(size):
    """Steps of one optimizer at once have no defined order with torch either; nothing may crash or hang."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (300, size, 5)]
    for param in params:
        param.grad = torch.full(param.shape, 0.25)
    opt = FusedMomentum(params, lr=1e-3, momentum=0.9)
    run_all([lambda: [opt.step() for _ in range(50 if size < 1_000_000 else 8)] for _ in range(4)])
    assert all(param.isfinite().all() for param in params)
    for param in params:
        assert opt.state[param]["momentum_buffer"].isfinite().all()


def test_gradients_and_buffers_replaced_while_another_thread_steps():
    """What a step works on stays alive until it is done, though the optimizer has let go of it."""
    param = torch.nn.Parameter(torch.randn(3_000_000))
    opt = FusedMomentum([param], lr=1e-3, momentum=0.9)
    param.grad = torch.full(param.shape, 0.25)
    opt.step()

    def replace():
        for _ in range(40):
            # Not to None: torch lets go of the GIL while .grad still names the tensor that it is destroying, so that
            # merely reading p.grad in another thread crashes, with no optimizer at all.
            param.grad = torch.full(param.shape, 0.25)
            opt.state[param]["momentum_buffer"] = torch.zeros(param.shape)

    run_all([lambda: [opt.step() for _ in range(20)], replace])
    assert param.isfinite().all() and opt.state[param]["momentum_buffer"].isfinite().all()
    opt.step()


def test_set_num_threads_between_steps():
    pair = Pair([torch.randn(n) for n in (300, 33, 32_003, 32_004, 32_005, 9_001)], **HYPER)
    for count in (1, 2, 5, 1, 3, 2):
        torch.set_num_threads(count)
        pair.step(2)


def test_set_num_threads_in_other_threads():
    """torch's thread count is per Python thread; each step uses that of its own."""

    def job(count, training):
        torch.set_num_threads(count)
        training.drive()

    trainings = [Training(seed) for seed in range(3)]
    run_all([lambda c=c, t=t: job(c, t) for c, t in zip((1, 2, 3), trainings, strict=True)])
    for training in trainings:
        training.check()


def test_other_python_threads_run_during_a_step():
    """The GIL is released while the kernel works: another thread's clock goes on ticking inside a long step."""
    torch.set_num_threads(1)
    param = torch.nn.Parameter(torch.ones(12_000_000))
    param.grad = torch.ones(12_000_000)
    opt = FusedMomentum([param], lr=0.1, momentum=0.9)
    opt.step()
    ticks, done = [], threading.Event()

    def clock():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0002)

    thread = threading.Thread(target=clock, daemon=True)
    thread.start()
    steps = []
    for _ in range(20):
        start = time.perf_counter()
        opt.step()
        steps.append((start, time.perf_counter()))
    done.set()
    thread.join(10)
    inside = [sum(start + 0.2 * (end - start) < t < end - 0.2 * (end - start) for t in ticks) for start, end in steps]
    # A machine that is busy elsewhere may starve the clock now and then, never in most of the steps.
    assert sum(count > 0 for count in inside) >= len(steps) // 2, inside


def test_backward_in_autograds_thread_and_step_in_a_hook():
    """Optimizer in backward: each parameter's own optimizer steps when its gradient is there."""

    def run(kind):
        model = torch.nn.Sequential(torch.nn.Linear(19, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3))
        opts = {param: kind([param], **HYPER) for param in model.parameters()}

        def step(param):
            opts[param].step()
            param.grad = None

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step)
        for _ in range(5):
            model(torch.randn(8, 19)).square().mean().backward()
        return model.parameters()

    assert_alike(run)


# -------------------------------------------------------------------------------------------------------------- fork

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def in_forked_child(work, timeout=60):
    """What `work()`, bytes, gives in a forked child; a child that hangs is killed and fails the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(work())
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(write)
    chunks, deadline = [], time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([read], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        chunk = os.read(read, 1 << 20)
        if not chunk:
            break
        chunks.append(chunk)
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the forked child failed"
    return b"".join(chunks)


def dump(params):
    return b"".join(p.detach().numpy().tobytes() for p in params)


def step_and_dump(opt):
    opt.step()
    return dump(params_of(opt))


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sizes", [(300, 33), (300, 300_001)], ids=["small", "large"])
@pytest.mark.parametrize("steps", [3, 1], ids=["after-steps", "before-any-step"])
@pytest.mark.parametrize("generations", [1, 2])
def test_forked_child_that_steps(sizes, steps, generations):
    """The parent has its threads running, the child inherits none of them: it must not wait for them."""
    torch.set_num_threads(2)
    Training(1, (300_001,), steps=2).drive()  # the parent's thread pool exists
    training = Training(0, sizes, steps=steps)
    training.up_to_the_last()
    work = lambda: step_and_dump(training.opt)  # noqa: E731
    result = in_forked_child(work if generations == 1 else lambda: in_forked_child(work))
    assert result == dump(training.expected)
    training.opt.step()  # and the parent goes on with all of its threads
    training.check()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((19,), index / 64)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loader_with_forked_workers_after_steps():
    """Epochs with fresh worker processes, steps before, between and after."""
    torch.set_num_threads(2)

    def run(kind):
        model = torch.nn.Sequential(torch.nn.Linear(19, 4000), torch.nn.Tanh(), torch.nn.Linear(4000, 30))
        opt = kind(model.parameters(), **HYPER)
        for _ in range(3):
            loader = torch.utils.data.DataLoader(
                Rows(), batch_size=16, num_workers=2, multiprocessing_context="fork", timeout=60
            )
            for batch in loader:
                opt.zero_grad()
                model(batch).square().mean().backward()
                opt.step()
        return model.parameters()

    assert_alike(run)


def test_spawned_process_gets_a_working_optimizer(tmp_path):
    """Pickled to another process, as torch.multiprocessing does."""
    training = Training(0, (300, 33), steps=3)
    training.up_to_the_last()
    file = tmp_path / "optimizer"
    file.write_bytes(pickle.dumps((training.opt, training.grads[-1])))
    code = (
        "import pickle, sys, torch\n"
        "opt, grads = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "for p, g in zip(opt.param_groups[0]['params'], grads): p.grad = g\n"
        "opt.step()\n"
        "torch.save([p.detach() for p in opt.param_groups[0]['params']], sys.argv[1])\n"
    )
    done = run_python(code, file, env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
    assert_all_same(torch.load(file), training.expected)
