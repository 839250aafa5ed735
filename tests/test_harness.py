"""The harness itself: its comparison and its snapshot see what they are there to see, and its oracle is torch's."""

import pytest
import torch
from harness import Oracle, Pair, Snapshot, assert_same, for_loop, miscount, only_elements_written, params_of, refused
from torch.optim.swa_utils import get_ema_multi_avg_fn
from values import BF16, EACH_COPY, FP8, FP32, INT8, all_values, in_layout, storage_of

from momentum_ext import FusedMomentum

HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def training():
    params = [torch.nn.Parameter(in_layout(torch.randn(33, 5), layout)) for layout in ("contiguous", "column")]
    opt = FusedMomentum(params, **HYPER, momentum_dtype=INT8, ema_decay=0.9, stochastic_rounding=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(33, 5)
        opt.step()
    return opt


CHANGES = {
    "a parameter": lambda opt, p, state: p.data.view(-1)[7].add_(1),
    "a version": lambda opt, p, state: p.detach().add_(0),
    "a guard beside a view": lambda opt, p, state: storage_of(params_of(opt)[1].detach())[0].add_(1),
    "a gradient": lambda opt, p, state: p.grad.data.view(-1)[3].neg_(),
    "another gradient": lambda opt, p, state: setattr(p, "grad", p.grad.clone()),
    "no gradient": lambda opt, p, state: setattr(p, "grad", None),
    "other memory": lambda opt, p, state: setattr(p, "data", p.data.clone()),
    **{f"a value of {key}": lambda opt, p, state, key=key: storage_of(state[key]).view(torch.uint8)[0].bitwise_xor_(1)
       for key in ("momentum_buffer", "momentum_scale", "ema")},
    "another buffer": lambda opt, p, state: state.update(momentum_buffer=state["momentum_buffer"].clone()),
    "a new key": lambda opt, p, state: state.update(note=1),
    "a key that went": lambda opt, p, state: state.pop("ema"),
    "an entry that went": lambda opt, p, state: opt.state.pop(p),
    "lr": lambda opt, p, state: opt.param_groups[0].update(lr=0.2),
    "a type": lambda opt, p, state: opt.param_groups[0].update(dampening=0.0),
    "a group": lambda opt, p, state: opt.param_groups.append({"params": []}),
    "an attribute": lambda opt, p, state: setattr(opt, "ema_decay", 0.8),
    "a shrunk storage": lambda opt, p, state: p.grad.untyped_storage().resize_(8),
    "the counts": lambda opt, p, state: miscount(opt),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_sees(change):
    opt = training()
    param = params_of(opt)[0]
    before = Snapshot(opt)
    before.assert_unchanged()
    CHANGES[change](opt, param, opt.state[param])
    with pytest.raises(AssertionError, match=r"."):
        before.assert_unchanged()


def test_what_is_refused_must_raise_and_change_nothing():
    opt = training()
    with pytest.raises(AssertionError, match=r"param"), refused(opt, ZeroDivisionError, "division"):
        params_of(opt)[0].data.zero_()
        raise ZeroDivisionError("division by zero")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"), refused(opt, ZeroDivisionError, "division"):
        pass


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([1.0]), torch.tensor([[1.0]])),
        (torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0])),
        (torch.tensor([1], dtype=INT8), torch.tensor([2], dtype=INT8)),
        (torch.tensor([1.0]).to(FP8), torch.tensor([1.125]).to(FP8)),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j])),
        (torch.eye(3).to_sparse(), torch.eye(3).mul(2).to_sparse()),
    ],
)
def test_the_comparison_sees(one, other):
    with pytest.raises(AssertionError, match="not bit-identical"):
        assert_same(one, other)
    assert_same(one, one.clone())
    assert_same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, -torch.nan]))


def test_a_neighbour_that_is_written_is_seen():
    base = torch.ones(40, 3)
    with only_elements_written(base[:, 1]):
        base[:, 1] = 2
    with pytest.raises(AssertionError, match="storage around"), only_elements_written(base[:, 1]):
        base[3, 2] = 2


@pytest.mark.parametrize("what", ["params", "momentum_buffer", "ema", "missing", "extra"])
def test_a_pair_sees(what):
    pair = Pair([torch.randn(33)], Oracle, **HYPER, ema_decay=0.9)
    pair.step(2)
    entry = pair.mine.state[params_of(pair.mine)[0]]
    if what in entry or what == "params":
        entry.get(what, params_of(pair.mine)[0].data)[3] += 1e-6
    elif what == "missing":
        del entry["ema"]
    else:
        entry["note"] = 1
    with pytest.raises(AssertionError, match=r"params\[0\]"):
        pair.check()


@EACH_COPY
def test_both_sides_go_on_in_copies(copied):
    pair = Pair([torch.randn(33), torch.randn(7)], Oracle, **HYPER, ema_decay=0.9)
    pair.step(2, missing=[1])
    pair.mine, pair.theirs = map(copied, pair.optimizers)
    pair.step(3)


def test_the_oracle_is_torchs_loop_and_rounds_once():
    """In fp32 the loop itself, with torch's own average; in 16 bits the exact value is nearest."""
    pair = Pair([torch.randn(1003)], Oracle, **HYPER, ema_decay=0.9)
    param = torch.nn.Parameter(pair.params[0][1].detach().clone())
    loop, averages = for_loop([param], **HYPER), []
    for _ in range(5):
        pair.step()
        param.grad = pair.params[0][1].grad
        loop.step()
        values = [param.detach().clone()]
        get_ema_multi_avg_fn(0.9)(averages, values, None) if averages else averages.extend(values)
        assert_same(pair.params[0][1], param)
        assert_same(pair.theirs.state[pair.params[0][1]]["ema"], averages[0])
    half = torch.nn.Parameter(all_values(BF16)[:20_000].clone())
    half.grad = half.detach().roll(7)
    exact = half.detach().to(FP32).sub(half.grad.to(FP32), alpha=0.1).to(BF16)
    Oracle([half], lr=0.1).step()
    assert_same(half, exact)
