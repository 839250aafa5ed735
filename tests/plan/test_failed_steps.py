"""A step that raises has changed nothing, and the next one is right: nothing of the failed one is left."""

import math
import threading

import numpy as np
import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_alike, for_loop, params_of, refused

from momentum_ext import FusedMomentum


def training(count=5):
    """Warm on some, fresh on others: parameters 0 and 1 have buffers, the others none yet."""
    pair = Pair([torch.randn(300) for _ in range(count)], lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)
    pair.step(missing=range(2, count))
    pair.new_grads()
    return pair


def last(opt):
    return params_of(opt)[-1]


def parameter(data, grad):
    def breaks(opt):
        p = last(opt)
        p.grad, p.data, p.grad = None, data(), grad

    return breaks


def buffer(value):
    return lambda opt: opt.state[last(opt)].update(momentum_buffer=value)


def group(**edit):
    """A group of one parameter with a buffer, added and then edited; MISSING takes the key away."""

    def breaks(opt):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(300))]})
        last(opt).grad, opt.state[last(opt)]["momentum_buffer"] = torch.randn(300), torch.randn(300)
        for key, value in edit.items():
            opt.param_groups[-1][key] = value
            if value is MISSING:
                del opt.param_groups[-1][key]

    return breaks


MISSING = object()


def integer_parameter(opt):
    opt.param_groups[0]["params"][-1] = p = torch.arange(300)
    p.grad = torch.ones(300, dtype=torch.int64)


def complex_gradient(opt):
    p = last(opt)
    p.grad_dtype = None
    p.grad = torch.ones(300, dtype=torch.complex64)


SHARED_PLACE = r"\['params'\]\[4\].*share one place in memory \(shape \[.*clone\(\)"
# How, and what the message says: the tensor, what was found and the remedy, where torch does not speak first.
BREAKAGES = {
    "expanded parameter": (parameter(lambda: torch.randn(1).expand(300), torch.randn(300)), SHARED_PLACE),
    "self-overlapping parameter": (
        parameter(lambda: torch.randn(600).as_strided((30, 10), (2, 1)), torch.randn(30, 10)),
        SHARED_PLACE,
    ),
    "integer parameter": (integer_parameter, "integral input tensors"),
    "gradient of another shape": (
        lambda opt: setattr(last(opt), "data", torch.randn(7)),
        r"gradient of .*\['params'\]\[4\].*\[7\].*\[300\]; set it to None",
    ),
    "buffer of another shape": (
        buffer(torch.randn(7)),
        r"momentum_buffer of .*\['params'\]\[4\].*\[300\].*\[7\]; delete it",
    ),
    "buffer larger than its parameter": (
        buffer(torch.randn(5, 300)),
        r"momentum_buffer of .*\['params'\]\[4\].*\[300\].*\[5, 300\]; delete it",
    ),
    "buffer that is no tensor": (buffer("buffer"), r"\['params'\]\[4\].*momentum_buffer.*str; delete the entry"),
    "expanded buffer": (buffer(torch.randn(1).expand(300)), "momentum_buffer of .*" + SHARED_PLACE),
    "integer buffer": (buffer(torch.ones(300, dtype=torch.int64)), "can't be cast to the desired output type Long"),
    "complex buffer": (
        buffer(torch.ones(300, dtype=torch.complex64)),
        "can't be cast to the desired output type Float",
    ),
    "complex gradient": (complex_gradient, "can't be cast to the desired output type Float"),
    "lr that is text": (group(lr="fast"), "'str'"),
    "lr of two elements": (group(lr=torch.tensor([0.1, 0.2])), "must be Number, not Tensor"),
    "momentum None": (group(momentum=None), "must be Tensor, not NoneType"),
    "missing key": (group(dampening=MISSING), r"param_groups\[1\]\['dampening'\] is missing; every group needs it"),
}
# Where our type isn't torch's: torch computes something for overlapping elements, and stumbles over a missing method.
OUR_TYPE = {"self-overlapping parameter": RuntimeError, "buffer that is no tensor": TypeError}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_step_that_raises_has_changed_nothing(breakage):
    """The bad tensor or group stands last, so whoever writes before having checked everything is caught."""
    pair = training()
    breaks, says = BREAKAGES[breakage]
    breaks(pair.mine)
    before = Snapshot(pair.mine)
    with pytest.raises(Exception, match=says) as raised:
        pair.mine.step()
    before.assert_unchanged()
    expected = OUR_TYPE.get(breakage)
    if expected is None:
        breaks(pair.theirs)
        with pytest.raises(Exception, match=r".") as torchs:
            pair.theirs.step()
        expected = torchs.type
    assert raised.type is expected, repr(raised.value)


@pytest.mark.parametrize("breakage", list(BREAKAGES)[:-4])
@pytest.mark.parametrize("why", ["tensor lr that requires grad", "differentiable"])
def test_a_step_that_raises_on_torchs_path_has_changed_nothing(why, breakage):
    """The same where all tensors go through torch's functional sgd, one after the other."""
    breaks, says = BREAKAGES[breakage]
    opt = training().mine
    if why == "differentiable":
        params = [p.detach() for p in params_of(opt)]
        opt = FusedMomentum([p.clone() for p in params], lr=0.1, momentum=0.9, differentiable=True)
        for param in params_of(opt):
            param.grad, opt.state[param]["momentum_buffer"] = torch.randn(300), torch.randn(300)
    else:
        opt.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    breaks(opt)
    with refused(opt, (RuntimeError, TypeError), says):
        opt.step()


@pytest.mark.parametrize("breakage", list(BREAKAGES)[:4])
def test_training_goes_on_after_an_error(breakage):
    """Once the cause is gone the next step is the one that torch would have taken."""
    pair = training()
    breaks, says = BREAKAGES[breakage]
    param = last(pair.mine)
    data, grad = param.data, param.grad
    breaks(pair.mine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says):
            pair.mine.step()
    param.grad = None
    param.data = data
    param.grad = grad
    pair.mine.param_groups[0]["params"][-1] = param
    pair.step_as_is()
    pair.step(3)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}], ids=["plain", "average"])
def test_training_goes_on_while_an_error_is_kept(options):
    """An error keeps the frames that it came through, and the step that was prepared there with them."""
    pair = Pair([torch.randn(9), torch.randn(33)], Oracle, lr=0.1, momentum=0.9, weight_decay=0.1, **options)
    pair.new_grads()
    param, grad = params_of(pair.mine)[1], params_of(pair.mine)[1].grad
    param.grad = grad.to_sparse()  # torch cannot decay beside it, and says so when the step is prepared
    with pytest.raises(RuntimeError, match="add") as kept:
        pair.mine.step()
    param.grad = grad
    pair.mine.state_dict()
    pair.step_as_is()
    pair.step()
    assert kept.tb is not None


def test_a_sparse_buffer_that_torch_can_multiply_but_not_add_to():
    """torch's step multiplies the buffer of fp16, and only then finds that it has no kernel to add the gradient."""
    dense, sparse = (torch.randn(9, dtype=torch.float16).requires_grad_() for _ in range(2))
    opt = FusedMomentum([dense, sparse], lr=0.1, momentum=0.9)
    for step in range(2):
        dense.grad, sparse.grad = torch.randn_like(dense), torch.randn_like(sparse).to_sparse()
        if step == 0:
            opt.step()
    with refused(opt, RuntimeError, "not implemented for 'Half'"):
        opt.step()
    sparse.grad = None
    opt.step()


def sparse(shape, dtype, count, sparse_dim):
    """A sparse tensor of so many elements, of which two share a place where there are two."""
    indices = torch.zeros((sparse_dim, count), dtype=torch.int64)
    values = torch.arange(1, 1 + count * math.prod(shape[sparse_dim:])).reshape(count, *shape[sparse_dim:])
    return torch.sparse_coo_tensor(indices, values.to(dtype), shape, check_invariants=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64])
@pytest.mark.parametrize(
    "shape, count, sparse_dim",
    [
        *(((5,), 0, 1), ((0,), 0, 1), ((5,), 1, 1), ((5,), 2, 1), ((4, 3), 0, 1), ((4, 3), 1, 1), ((4, 3), 2, 1)),
        *(((4, 3), 2, 2), ((4, 0), 2, 1), ((4, 3), 1, 0), ((0, 3), 0, 1)),
    ],
)
@pytest.mark.parametrize("is_coalesced", [False, True])
def test_a_sparse_gradient_is_refused_where_torch_refuses_it(dtype, shape, count, sparse_dim, is_coalesced):
    """Also where it holds nothing: that is a batch in which an embedding was not asked for."""

    def run(kind):
        opt = kind([torch.ones(shape, dtype=dtype).requires_grad_()], lr=0.1, momentum=0.9)
        (param,) = params_of(opt)
        for elements in (count, 0, count, 2 * min(count, 1)):
            try:
                grad = sparse(shape, dtype, elements, sparse_dim)
                grad = grad.coalesce() if is_coalesced else grad
            except RuntimeError:
                continue  # torch has no such gradient of this dtype
            param.grad = grad
            try:
                opt.step()
            except RuntimeError as error:
                outcomes[kind].append(str(error).splitlines()[0])
                return
            outcomes[kind].append(None)
            yield param.detach().clone()

    outcomes = {FusedMomentum: [], for_loop: []}
    assert_alike(run)
    assert outcomes[FusedMomentum] == outcomes[for_loop]


def test_a_prepared_step_that_is_dropped_has_changed_nothing():
    opt = training().mine
    before = Snapshot(opt)
    prepared = opt._plan.prepare(opt.param_groups, opt.state, averaging=True)
    with pytest.raises(RuntimeError, match="inside a step"):
        opt.state_dict()
    del prepared
    before.assert_unchanged()
    with opt._plan.prepare(opt.param_groups, opt.state) as prepared:
        pass
    for use in (prepared.begin, prepared.run, prepared.fallback, prepared.is_on_devices, prepared.__enter__):
        with pytest.raises(RuntimeError, match="has run or was discarded"):
            use()
    before.assert_unchanged()
    opt.step()


class Meddling(dict):
    """A state that uses the step that is writing to it."""

    def use(self):
        self.prepared.__exit__(None, None, None)  # no effect
        with pytest.raises(RuntimeError, match="this step is running"):
            self.prepared.run()
        self.used += 1

    def __getitem__(self, param):
        if hasattr(self, "prepared"):
            self.use()
        return super().__getitem__(param)

    def __setitem__(self, param, entry):
        if hasattr(self, "prepared"):
            self.use()
        super().__setitem__(param, entry)


@pytest.mark.parametrize("first", ["begin", "run"])
def test_a_step_that_writes_is_not_ended_by_what_it_calls(first):
    pair = training()
    opt = pair.mine
    opt.state = Meddling(opt.state)
    opt.state.used = 0
    prepared = opt.state.prepared = opt._plan.prepare(opt.param_groups, opt.state)
    getattr(prepared, first)()
    if first == "begin":
        prepared.run()
    assert opt.state.used > 0
    with pytest.raises(RuntimeError, match="has run or was discarded"):
        prepared.run()
    pair.theirs.step()
    pair.check()


def test_a_thread_that_has_ended_is_not_taken_for_one_that_came_after_it():
    """The system gives a thread's id to a later one, which is then not inside of the first one's step."""
    opt = training().mine
    held, errors = [], []

    def step():
        try:
            opt.step()
        except RuntimeError as error:
            errors.append(error)

    first = threading.Thread(target=lambda: held.append(opt._plan.prepare(opt.param_groups, opt.state)))
    first.start()
    first.join()
    second = threading.Thread(target=step)
    second.start()
    held.pop().__exit__(None, None, None)  # or the second would wait for ever
    second.join()
    assert not errors


def test_training_goes_on_after_a_buffer_that_was_no_tensor():
    pair = training()
    pair.step()
    param = pair.params[1][0]
    kept = pair.mine.state[param]["momentum_buffer"]
    pair.mine.state[param]["momentum_buffer"] = "oops"
    with pytest.raises(TypeError, match=r"params'\]\[1\].*momentum_buffer"):
        pair.mine.step()
    pair.mine.state[param]["momentum_buffer"] = kept
    pair.step_as_is()
    pair.step()


def test_after_a_step_on_torchs_path_without_gradients():
    pair = training()
    pair.step()
    pair.mine.param_groups[0]["lr"] = np.float32(0.1)  # a kind of number that only torch reads
    pair.step(missing=range(5))
    pair.mine.param_groups[0]["lr"] = 0.1
    pair.step(2)


@pytest.mark.parametrize("good", [0, 1, 2])
def test_state_that_refuses_an_entry_on_the_first_step(good):
    class Refuses(dict):
        full = True

        def __setitem__(self, key, value):
            if self.full and len(self) == good:
                raise KeyboardInterrupt("in the middle")
            super().__setitem__(key, value)

    pair = Pair([torch.randn(300) for _ in range(3)], lr=0.1, momentum=0.9)
    pair.new_grads()
    pair.mine.state = Refuses()
    with refused(pair.mine, KeyboardInterrupt, "in the middle"):
        pair.mine.step()
    assert not pair.mine.state
    pair.mine.state.full = False
    pair.step_as_is()


def test_step_inside_a_step_is_an_error():
    class Curious(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            pair.mine.step()

    pair = Pair([torch.randn(300)], lr=0.1, momentum=0.9)
    pair.new_grads()
    pair.mine.state = Curious()
    with refused(pair.mine, RuntimeError, "inside a step"):
        pair.mine.step()
    assert not pair.mine.state


def test_closure_that_raises():
    pair = training()
    with refused(pair.mine, ZeroDivisionError, "division by zero"):
        pair.mine.step(lambda: 1 / 0)
    assert torch.is_grad_enabled()
    pair.step(2)
