"""update_report() counts the elements that the last step has really left as they were."""

import pytest
import torch
from harness import Snapshot
from values import BF16, FP8, FP16, FP32, FP64, INT4, INT8, dtype_name, in_layout

from momentum_ext import _C, FusedMomentum

# Where values around 1 are stored, and a learning rate whose steps are now above, now below what that resolves.
STORAGES = {
    "bfloat16": (BF16, {}, 2e-3),
    "float16": (FP16, {}, 3e-4),
    "float32": (FP32, {}, 5e-8),
    "float64": (FP64, {"momentum_dtype": None}, 1e-16),
    "bfloat16 + 32-bit master": (BF16, {"master_weights": True}, 5e-8),
    "bfloat16 + 24-bit master": (BF16, {"master_weights": 24, "stochastic_rounding": False}, 1e-5),
    "float16 + 32-bit master": (FP16, {"master_weights": True}, 5e-8),
}
RULES = {
    "momentum": {},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
    "plain": {"momentum": 0, "maximize": True},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.3},
    "classical": {"formulation": "classical"},
    "ema, nesterov": {"formulation": "ema", "nesterov": True},
}


class Training:
    """One parameter of about 1 whose gradients have the same size throughout."""

    def __init__(self, dtype=BF16, shape=(3000,), layout=None, **options):
        self.generator = torch.Generator().manual_seed(0)
        values = (torch.randn(shape, generator=self.generator) + 1).to(dtype)
        self.param = torch.nn.Parameter(in_layout(values, layout) if layout else values)
        self.opt = FusedMomentum([self.param], **{"momentum": 0.9, "momentum_dtype": FP32, **options})

    def step(self, scale=1.0):
        """How many elements the step has left as they were, of those whose update is not zero."""
        self.param.grad = (torch.randn(self.param.shape, generator=self.generator) * scale).to(self.param.dtype)
        before = self.stored()
        self.opt.step()
        same = [now == then for now, then in zip(self.stored(), before, strict=False)]
        return int(torch.stack(same).all(0).sum())

    def stored(self):
        entry = self.opt.state.get(self.param, {})
        return [t.detach().clone() for t in (self.param, *(entry[key] for key in MASTERS if key in entry))]

    def report(self):
        (row,) = self.opt.update_report()
        return row


MASTERS = ("param_remainder", "master_param")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", STORAGES)
def test_counts_what_has_not_moved(storage, rule):
    """All of it; and few more, which this step has moved and one more like it would not: ties and ends of binades."""
    dtype, options, lr = STORAGES[storage]
    training = Training(dtype, lr=lr, **{**options, **RULES[rule]})
    training.step(), training.step()
    stood_still = training.step()
    row = training.report()
    assert (row.group, row.dtype, row.storage, row.rounding) == (0, dtype, storage, "to nearest")
    assert row.numel == row.updates == 3000
    assert 0 <= row.below - stood_still <= 20 and 100 < stood_still < 2900
    assert row.lost == row.below


@pytest.mark.parametrize("layout", ["permuted", "column", "inner"])
@pytest.mark.parametrize("storage", ["bfloat16", "bfloat16 + 24-bit master"])
def test_in_any_layout(storage, layout):
    dtype, options, lr = STORAGES[storage]
    training = Training(dtype, (50, 60), layout, lr=lr, **options)
    training.step()
    stood_still = training.step()
    assert 0 <= training.report().below - stood_still <= 20 and 100 < stood_still < 2900


@pytest.mark.parametrize("dtype", [BF16, FP16, INT8, FP8, INT4], ids=dtype_name)
def test_momentum_in_fewer_bits_counts_as_it_is_stored(dtype):
    training = Training(lr=2e-3, momentum_dtype=dtype)
    training.step()
    found = training.report()
    entry = training.opt.state[training.param]
    scale = entry.pop("momentum_scale", None)
    buffer = entry["momentum_buffer"]
    entry["momentum_buffer"] = buffer.float() if scale is None else _C.dequantize(buffer, scale, training.param.shape)
    assert found == training.report() and 300 < found.below < 2700


def test_zeros_are_no_updates():
    training = Training(lr=1.0)
    training.param.grad = torch.zeros_like(training.param)
    training.param.grad[:10] = 1e-6
    training.opt.step()
    row = training.report()
    assert (row.updates, row.below, row.numel) == (10, 10, 3000)
    training.opt.param_groups[0]["lr"] = 0.0
    assert training.report().updates == 0


@pytest.mark.parametrize(
    "options, lr", [({"stochastic_rounding": True}, 2e-3), ({"master_weights": 24}, 1e-5)], ids=str
)
def test_rounded_at_random(options, lr):
    """What is below the resolution moves in the long run; what is lost, in fp32 before the rounding, does not."""

    def report_and_run(lr):
        training = Training(lr=lr, momentum=0, **options)
        training.step()
        row, before = training.report(), training.stored()
        assert row.rounding == "at random"
        for _ in range(30):
            training.opt.step()
        same = torch.stack([now == then for now, then in zip(training.stored(), before, strict=True)])
        return row, int(same.all(0).sum())

    row, stood_still = report_and_run(lr)
    assert 300 < row.below < 2900 and row.lost < 30 and stood_still < row.below / 2
    row, stood_still = report_and_run(5e-8)
    assert row.below > 2950 and 300 < row.lost <= stood_still


@pytest.mark.parametrize("way", ["clip_grad_norm_", "max_grad_norm", "scaler"])
def test_what_gradients_were_multiplied_with(way):
    """It is remembered from the step, and gone after one without."""
    training = Training(lr=2e-3 * 64, nesterov=True)
    if way == "scaler":
        training.opt.grad_scale, training.opt.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    elif way == "max_grad_norm":
        training.opt.max_grad_norm = 3000**0.5 / 64
    if way == "clip_grad_norm_":
        training.param.grad = torch.randn(3000, generator=training.generator).to(BF16)
        training.opt.clip_grad_norm_(3000**0.5 / 64)
        before = training.stored()[0]
        training.opt.step()
        stood_still = int((training.stored()[0] == before).sum())
    else:
        stood_still = training.step()
    assert 0 <= training.report().below - stood_still <= 20 and 100 < stood_still < 2900


def test_after_a_step_without_a_factor():
    training = Training(lr=2e-3, nesterov=True)
    training.opt.max_grad_norm = 1e-3
    training.step()
    training.opt.max_grad_norm = None
    stood_still = training.step()
    assert 0 <= training.report().below - stood_still <= 20 and 100 < stood_still < 2900


def test_rows_and_the_table():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size, dtype in
              ((100, BF16), (200, BF16), (300, FP32), (400, BF16))]  # fmt: skip
    opt = FusedMomentum(
        [{"params": params[:3]}, {"params": params[3:], "stochastic_rounding": True}], lr=1e-9, momentum=0.9
    )
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    report = opt.update_report()
    assert [(row.group, row.storage, row.rounding, row.numel) for row in report] == [
        (0, "bfloat16", "to nearest", 300), (0, "float32", "to nearest", 300), (1, "bfloat16", "at random", 400)
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert len(lines) == 4 and lines[0].endswith("below resolution     lost")
    assert lines[1].split() == ["0", "bfloat16", "to", "nearest", "300", "100.0", "%", "100.0", "%"]
    assert all(len(line) == len(lines[0]) for line in lines)


def test_writes_nothing_and_counts_alike_on_any_thread():
    training = Training(shape=(100_003,), lr=2e-3, momentum_dtype=INT8, master_weights=24)
    training.step()
    before = Snapshot(training.opt)
    found = training.report()
    before.assert_unchanged()
    _C.set_elements_per_thread(1000)
    try:
        assert training.report() == found
    finally:
        _C.set_elements_per_thread(1 << 18)


def test_what_there_is_nothing_to_count_of():
    training = Training(lr=1e-3)
    nothing = r"update_report\(\): there is no update to look at; call it after step\(\)"
    with pytest.raises(RuntimeError, match=nothing):
        training.opt.update_report()
    training.step()
    training.opt.zero_grad()
    assert training.report().updates == 3000  # the momentum buffer says it all
    training.opt.param_groups[0]["nesterov"] = True
    with pytest.raises(RuntimeError, match=nothing):
        training.opt.update_report()
    with training.opt.iterate_weights(), pytest.raises(RuntimeError, match="iterate_weights"):
        training.opt.update_report()


def test_sparse_gradients_are_left_out():
    table, other = (torch.nn.Parameter(torch.ones(10, 4)) for _ in range(2))
    opt = FusedMomentum([table, other], lr=1e-9)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (10, 4), check_invariants=True)
    other.grad = torch.ones(10, 4)
    opt.step()
    (row,) = opt.update_report()
    assert (row.numel, row.updates) == (40, 40)


def test_a_formulation_that_is_edited():
    """Buffers are what their group says that they are; the next step converts them."""
    training = Training(lr=2e-3)
    training.step()
    found = training.report()
    training.opt.param_groups[0]["formulation"] = "classical"
    assert training.report() == found and 300 < found.below < 2700


def test_before_a_step_there_is_none_to_report():
    """Though without momentum the gradient would do."""
    param = torch.nn.Parameter(torch.ones(8))
    opt = FusedMomentum([param], lr=0.1)
    param.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="there is no update to look at; call it after step"):
        opt.update_report()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="there is no update to look at; call it after step"):
        opt.update_report()


def test_an_edit_that_the_last_steps_formulation_does_not_know():
    training = Training(formulation="ema")
    training.step()
    group = training.opt.param_groups[0]
    del group["formulation"]
    group["dampening"] = 0.5
    with pytest.raises(RuntimeError, match=r"formulation 'ema'.*dampening.*call it before the edit"):
        training.opt.update_report()


def test_gradients_that_torch_negates_lazily():
    training = Training(nesterov=True, lr=2e-3)
    training.step()
    wanted = training.report()
    training.param.grad = torch._neg_view(-training.param.grad)
    assert training.report() == wanted
