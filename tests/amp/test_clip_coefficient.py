"""How long a clip coefficient lives, and whose it is: as if torch had clipped the gradients in place.

Each row does the same to two optimizers; on torch's side clipping is torch.nn.utils.clip_grad_norm_.
"""

import math

import pytest
import torch
from harness import Snapshot, assert_same

import momentum_ext
from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(1003,), (33,), (5, 7), (33,)]


class Side:
    def __init__(self, is_ours, dtype=torch.float32, flat=False, **hyper):
        self.is_ours, self.generator = is_ours, torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(self.new(shape, dtype)) for shape in SHAPES]
        self.max_grad_norm = hyper.get("max_grad_norm")
        if is_ours:
            self.opt = FusedMomentum(self.params, **HYPER, **hyper)
        else:
            self.opt = torch.optim.SGD(self.params, **HYPER, foreach=False)
        self.norms = []
        self.new_grads()
        if flat:
            self.bucket = torch.cat([p.grad.reshape(-1) for p in self.params])
            self.view_bucket()

    def new(self, shape, dtype):
        return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32), generator=self.generator).to(dtype)

    def new_grads(self, *indices):
        for index in indices or range(len(SHAPES)):
            param = self.params[index]
            param.grad = self.new(param.shape, param.dtype) * 7

    def add_grads(self):
        """What a backward does to gradients that are there."""
        for param in self.params:
            param.grad += self.new(param.shape, param.dtype)

    def view_bucket(self):
        pieces = self.bucket.split([p.numel() for p in self.params])
        for param, piece in zip(self.params, pieces, strict=True):
            param.grad = piece.view(param.shape)

    def each_grad(self, change):
        for param in self.params:
            param.grad = change(param.grad)

    def clip(self, max_norm=0.5, norm_type=2.0):
        clip = self.opt.clip_grad_norm_ if self.is_ours else self._clip
        self.norms.append(clip(max_norm, norm_type))

    def _clip(self, max_norm, norm_type=2.0):
        return torch.nn.utils.clip_grad_norm_(self.params, max_norm, norm_type, foreach=False)

    def step(self):
        if self.max_grad_norm is not None and not self.is_ours:
            self.norms.append(self._clip(self.max_grad_norm))
        self.opt.step()
        if self.max_grad_norm is not None and self.is_ours:
            self.norms.append(self.opt.grad_norm)

    def tensors(self, index):
        param = self.params[index]
        return [param, *self.opt.state[param].values()]

    def fail(self):
        """A step that raises, for a reason of its own."""
        handle = self.opt.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.opt.step()
        handle.remove()


def compare(action, dtype=torch.float32, **hyper):
    """`action`, a step, and another one with new gradients, on both sides."""
    ours, torchs = sides = [Side(is_ours, dtype, **hyper) for is_ours in (True, False)]
    eps = 16 * torch.finfo(dtype).eps
    for do in (action, Side.new_grads):
        for side in sides:
            do(side)
            side.step()
        for index in range(len(SHAPES)):
            for mine, theirs in zip(*(side.tensors(index) for side in sides), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=eps, atol=eps, equal_nan=True)
    torch.testing.assert_close(ours.norms, torchs.norms, rtol=eps, atol=0, equal_nan=True)


def replace_by(change):
    def action(side):
        side.clip()
        side.each_grad(change)

    return action


def then(*calls):
    """A clip, and then these."""

    def action(side):
        side.clip()
        for call in calls:
            call(side)

    return action


def swap(side):
    side.params[1].grad, side.params[3].grad = side.params[3].grad, side.params[1].grad


def take_away(side):
    side.params[2].grad = None


def bring_back(side):
    kept = side.params[2].grad
    side.params[2].grad = None
    side.params[2].grad = kept


def while_gone(act, index=2):
    """A gradient that is not there for a while keeps what it had."""

    def action(side):
        kept = side.params[index].grad
        side.params[index].grad = None
        act(side)
        side.params[index].grad = kept

    return action


def write_whole(side):
    for param in side.params:
        param.grad.zero_()
    side.add_grads()


LIVES = {
    "untouched": then(),
    "detach": replace_by(lambda g: g.detach()),
    "data": replace_by(lambda g: g.data),
    "view": replace_by(lambda g: g.view(g.shape)),
    "slice": replace_by(lambda g: g[:]),
    "transposed-twice": replace_by(lambda g: g.mT.mT if g.dim() > 1 else g[None][0]),
    "alias": replace_by(torch.ops.aten.alias),
    "swapped": then(swap),
    "cleared": then(take_away),
    "gone-and-back": then(bring_back),
    "gone-during-a-second-clip": then(while_gone(lambda side: side.clip(0.3))),
    "gone-during-a-step": then(while_gone(Side.step), lambda side: side.new_grads(0, 1, 3)),
    "the-last-gone-during-a-step": then(while_gone(Side.step, 3), lambda side: side.new_grads(0, 1, 2)),
    "replaced": then(lambda side: side.new_grads(1)),
    "replaced-and-viewed": then(lambda side: side.each_grad(torch.detach), lambda side: side.new_grads(0, 2)),
    "all-replaced": then(Side.new_grads),
    "a-second-clip": then(lambda side: side.clip(0.3)),
    "a-second-clip-that-does-nothing": then(lambda side: side.clip(1e3)),
    "a-second-clip-of-another-norm": then(lambda side: side.clip(0.1, math.inf), lambda side: side.clip(2.0, 1.0)),
    "partly-replaced-then-clipped": then(lambda side: side.new_grads(1), lambda side: side.clip(0.3)),
    "twice-so": then(
        lambda side: side.new_grads(1), lambda side: side.clip(0.3), lambda side: side.new_grads(0), Side.clip
    ),
    "partly-cleared-then-clipped": then(take_away, lambda side: side.clip(0.3)),
    "by-torch-after-ours": then(lambda side: side.clip(0.3, 3.0)),
    "partly-replaced-then-by-torch": then(lambda side: side.new_grads(1), lambda side: side.clip(0.3, 3.0)),
    "of-a-late-gradient": lambda side: (take_away(side), side.clip(), side.new_grads(2)),
    "retry": then(Side.fail),
    "retry-with-one-replaced": then(Side.fail, lambda side: side.new_grads(1), Side.fail),
    "zero_grad": then(lambda side: side.opt.zero_grad(), Side.new_grads),
    "zero_grad-in-place": then(lambda side: side.opt.zero_grad(set_to_none=False), Side.add_grads),
    "known-to-be-1-and-written": lambda side: (side.clip(1e4), side.add_grads()),
    "in-place-after-a-step": then(Side.step, write_whole),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", LIVES)
def test_as_torch(row, dtype):
    compare(LIVES[row], dtype)


@pytest.mark.parametrize("row", ["untouched", "replaced", "partly-replaced-then-clipped", "retry", "cleared"])
def test_max_grad_norm_beside_a_pending_clip(row):
    compare(LIVES[row], max_grad_norm=0.2)


BUCKETS = {
    "viewed-again": then(Side.view_bucket),
    "viewed-again-then-clipped": then(Side.view_bucket, lambda side: side.clip(0.3)),
    "one-replaced": then(lambda side: side.new_grads(1)),
    "one-came-later": while_gone(Side.clip),  # beside the others in memory
}


@pytest.mark.parametrize("row", BUCKETS)
def test_views_of_one_bucket(row):
    """As DistributedDataParallel's gradient_as_bucket_view."""
    compare(BUCKETS[row], flat=True)


def overflow(*calls):
    def action(side):
        side.params[1].grad[5] = math.inf
        side.clip()
        for call in calls:
            call(side)

    return action


def write_one(side):
    side.params[1].grad.zero_().add_(3.0)


OVERFLOWS = {
    "untouched": overflow(),
    "written": overflow(write_whole),
    "one-written": overflow(write_one),
    "one-replaced": overflow(lambda side: side.new_grads(1)),
    "one-written-then-clipped": overflow(write_one, lambda side: side.clip(0.3)),
    "written-then-clipped": overflow(write_whole, lambda side: side.clip(0.3)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", OVERFLOWS)
def test_a_norm_that_is_not_finite(row, dtype):
    """It applies to gradients that nobody has touched, and lapses for those that were written."""
    compare(OVERFLOWS[row], dtype)


WRITES = {
    "accumulated": Side.add_grads,
    "one": lambda side: side.params[2].grad.mul_(2),
    "one-element": lambda side: side.params[2].grad.view(-1)[3].zero_(),
    "zeroed": lambda side: side.params[2].grad.zero_(),
    "a-view-of-it": lambda side: side.params[2].grad.view(-1)[:2].add_(1),
    "viewed-then-written": lambda side: (side.each_grad(torch.detach), side.params[2].grad.add_(1)),
    "data-then-written": lambda side: (side.each_grad(lambda g: g.data), side.params[2].grad.add_(1)),
    "after-a-second-clip": lambda side: (side.clip(0.3), side.params[2].grad.add_(1)),
    "beside-a-replaced-one": lambda side: (side.new_grads(0), side.params[2].grad.add_(1)),
    "after-a-step-that-raised": lambda side: (side.fail(), side.params[2].grad.add_(1)),
}
REFUSED = r"gradient of param_groups\[0\]\['params'\]\[{}\].*clip last.*optimizer\.zero_grad\(\).*max_grad_norm"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", WRITES)
def test_written_gradients_are_refused(row, dtype):
    """Before anything is written; then what was written is replaced, and the others are clipped."""
    side = Side(True, dtype)
    side.step()
    side.new_grads()
    side.clip()
    WRITES[row](side)
    before = Snapshot(side.opt)
    for act in (side.opt.step, side.clip):
        with pytest.raises(RuntimeError, match=REFUSED.format(0 if row == "accumulated" else 2)):
            act()
        before.assert_unchanged()
    side.opt.zero_grad()
    side.new_grads()
    side.step()


def test_the_whole_bucket_written():
    side = Side(True, flat=True)
    side.clip()
    side.bucket.mul_(2)
    before = Snapshot(side.opt)
    with pytest.raises(RuntimeError, match=REFUSED.format(0)):
        side.step()
    before.assert_unchanged()


def test_what_was_written_is_replaced():
    def action(side):
        side.clip()
        side.params[2].grad.add_(1)
        if side.is_ours:
            with pytest.raises(RuntimeError, match="clip last"):
                side.step()
        side.new_grads(2)

    compare(action)


def test_a_new_gradient_at_the_same_address():
    """The coefficient belongs to the storage object, not to its address."""

    def action(side):
        memory = [param.grad.numpy().copy() for param in side.params]
        side.each_grad(lambda _: torch.from_numpy(memory.pop(0)))
        side.clip()
        memory = [param.grad.numpy() for param in side.params]
        side.each_grad(lambda _: None)
        for param, array in zip(side.params, memory, strict=True):
            array.fill(7.0)
            param.grad = torch.from_numpy(array)

    compare(action)


def test_two_optimizers_that_exchange_gradients():
    """A coefficient does not pass to others, by way of another optimizer either."""
    sides = [Side(True), Side(True)]
    torchs = Side(False)
    sides[0].clip()
    for a, b in zip(*(side.params for side in sides), strict=True):
        a.grad, b.grad = b.grad, a.grad
    sides[0].step()  # what came from the other was not clipped
    torchs.step()
    for a, b in zip(sides[0].params, torchs.params, strict=True):
        assert_same(a, b)


# --------------------------------------------------------------------------------------------- momentum_ext.GradScaler


def replace_one_alone(side):
    side.each_grad(lambda _: None)
    side.new_grads(1)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscales", [False, True], ids=["step", "unscale-clip-step"])
@pytest.mark.parametrize("after", [write_whole, Side.new_grads, replace_one_alone], ids=lambda after: after.__name__)
def test_after_a_step_that_was_left_out(after, unscales, fused):
    """model.zero_grad() in either form and a new backward: no stale clip, no error."""

    def action(side):
        kind = momentum_ext.GradScaler if side.is_ours else torch.amp.GradScaler
        scaler = kind("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        side.params[1].grad[5] = math.inf
        if unscales:
            scaler.unscale_(side.opt)
            side.clip()
        scaler.step(side.opt)
        scaler.update()
        after(side)

    compare(action, fused=fused)


def test_after_a_step_that_another_ranks_overflow_leaves_out():
    """Its own norm is finite, and the coefficient ends with the step all the same."""

    def action(side):
        side.clip()
        if side.is_ours:
            side.opt.found_inf = torch.ones(())
            side.opt.step()
            del side.opt.found_inf
        write_whole(side)

    compare(action)


@pytest.mark.parametrize("index", [2, 3])
def test_a_gradient_goes_between_unscaling_and_clipping(index):
    """The norm that unscale_() has found is that of other gradients."""

    def action(side):
        kind = momentum_ext.GradScaler if side.is_ours else torch.amp.GradScaler
        scaler = kind("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(side.opt)
        side.params[index].grad = None
        side.clip()

    compare(action)


@pytest.mark.parametrize("change", ["replaced", "viewed-copy", "written", "one-appears"])
def test_unscaled_gradients_are_the_steps_own(change):
    """1 / scale is no clip coefficient: gradients that are replaced or written after unscale_() are refused."""
    side = Side(True)
    scaler = momentum_ext.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    if change == "one-appears":
        take_away(side)
    scaler.unscale_(side.opt)
    if change == "written":
        side.params[2].grad.add_(1)
    elif change == "viewed-copy":
        side.params[2].grad = side.params[2].grad.clone().view(5, 7)
    else:
        side.new_grads(2)
    before = Snapshot(side.opt)
    for act in (lambda: scaler.step(side.opt), side.clip):
        with pytest.raises(RuntimeError, match=r"params'\]\[2\].*unscale_\(\).*zero_grad"):
            act()
        before.assert_unchanged()


@pytest.mark.parametrize("first, then", [(slice(None, None, 2), slice(0, 4)), (slice(0, 4), slice(None, None, 2))])
def test_another_view_that_begins_at_the_same_place(first, then):
    """Its record tells its own memory, not that of the view before it."""
    base = torch.ones(8)
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (4, 3)]
    opt = FusedMomentum(params, lr=1.0)
    for view in (first, then):
        params[0].grad, params[1].grad = base[view], torch.ones(3)
        opt.clip_grad_norm_(1.0)
        if view is first:
            opt.step()
    with torch.no_grad():
        for param in params:
            param.zero_()
    params[1].grad = torch.ones(3)  # other memory: not clipped
    opt.step()
    torch.testing.assert_close(params[0].detach(), torch.full((4,), -1 / 7**0.5))
    assert torch.equal(params[1], -torch.ones(3))
    params[0].grad, params[1].grad = base[then], torch.ones(3)
    opt.clip_grad_norm_(1.0)
    params[1].grad = base[5:8]  # a part of what the view before may have
    if then == slice(0, 4):
        opt.step()
        return
    with pytest.raises(RuntimeError, match=r"params'\]\[1\]: it was written to after clip_grad_norm_"):
        opt.step()


def test_a_norm_of_no_gradients_after_unscale():
    """What unscale_() has found was of gradients that are gone."""
    param = torch.nn.Parameter(torch.zeros(3))
    opt = FusedMomentum([param], lr=1.0)
    scaler = momentum_ext.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.ones(3)
    scaler.unscale_(opt)
    param.grad = None
    for _ in range(3):
        assert opt.clip_grad_norm_(1.0) == 0
