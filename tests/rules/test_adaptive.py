"""FusedAdam, FusedAdamW and FusedNAdam have the bits of torch's for-loops, whatever a user does between two steps."""

import contextlib
import copy
import math

import pytest
import torch
from adaptive import EACH_OPTION, EACH_RULE, RULES
from harness import assert_all_same, assert_same, refused
from values import (
    BF16,
    COPIES,
    EXACT_DTYPES,
    FP16,
    FP32,
    FP64,
    HALF_DTYPES,
    INT4,
    INT8,
    LAYOUTS,
    in_layout,
    through_file,
)

from momentum_ext import FusedAdam, FusedAdamW, FusedNAdam

SHAPES = [(), (1,), (3, 5), (257,), (64, 33), (32_703,)]


def params(dtype=FP32, shapes=SHAPES):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def twice(values):
    """The same parameters, for two optimizers."""
    return [[value.clone().requires_grad_() for value in values] for _ in range(2)]


def new_grads(pairs):
    for a, b in zip(*pairs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()


@EACH_OPTION
@EXACT_DTYPES
@pytest.mark.parametrize(
    "lr", [0.017, torch.tensor(0.017), torch.tensor(0.017, dtype=FP64)], ids=["lr", "fp32", "fp64"]
)
def test_trajectory(rule, options, dtype, lr, isa, threads):
    # torch multiplies two tensors of no dimension in the wider of their dtypes.
    is_wider = isinstance(lr, torch.Tensor) and lr.dtype == FP64 and dtype != FP64
    pair = rule.pair(params(dtype, SHAPES[1:] if is_wider else SHAPES), lr=lr, **options)
    for t in range(6):
        pair.step(missing={i for i in range(len(SHAPES)) if (i + t) % 3 == 0 and t < 4})


@EACH_RULE
@EXACT_DTYPES
def test_long_trajectory(rule, dtype, isa):
    """Bias corrections until they are nothing."""
    pair = rule.pair(params(dtype, [(7,), (300,)]), lr=0.01, weight_decay=0.02)
    for t in range(1000):
        pair.new_grads(scale=10.0 ** (t % 5 - 2))
        pair.both(lambda opt: opt.step())
        if t % 100 == 99:
            pair.check()


@EACH_RULE
@HALF_DTYPES
def test_half_precision_is_rounded_once(rule, dtype, isa):
    pair = rule.pair(params(dtype), lr=0.01, weight_decay=0.02)
    pair.step(5, missing={1})
    pair.step(3)


@EACH_RULE
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(FP32, FP16), (FP32, BF16), (FP64, FP32), (FP64, BF16), (BF16, FP32), (FP16, FP64)],
    ids=str,
)
def test_gradients_of_another_dtype(rule, dtype, grad_dtype, isa):
    pair = rule.pair(params(dtype), lr=0.01)
    for _ in range(4):
        for index, (mine, _) in enumerate(pair.params):
            grad = pair.random_like(mine, grad_dtype)
            for _, param in pair.each(index):
                param.grad_dtype = None
                param.grad = grad.clone()
        pair.step_as_is()


@EACH_RULE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(rule, layout, grad_layout):
    values = torch.randn(6, 5, 4)
    pair = rule.pair([in_layout(values, layout), torch.randn(3)], lr=0.01, weight_decay=0.1)
    for _ in range(4):
        pair.set_grad(0, in_layout(torch.randn(6, 5, 4), grad_layout))
        pair.set_grad(1, torch.randn(3))
        pair.step_as_is()


@EACH_RULE
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_its_real_view(rule, dtype, isa):
    values = [torch.randn(33, dtype=dtype), torch.randn(4, 3, dtype=dtype).t()]
    mine = [value.clone().requires_grad_() for value in values]
    theirs = [torch.view_as_real(value).clone().requires_grad_() for value in values]
    opts = rule.kind(mine, lr=0.01, weight_decay=0.1), rule.loop(theirs, lr=0.01, weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = torch.view_as_real(a.grad).clone()
        for opt in opts:
            opt.step()
        assert_all_same([torch.view_as_real(a.detach()) for a in mine], theirs)


@EACH_RULE
@EXACT_DTYPES
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-42, 1e-30, 3e38])
def test_special_values_wherever_they_stand(rule, dtype, special, isa):
    options = {"amsgrad": True} if rule.name != "nadam" else {}
    for where in ("grad", "param", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options else [])):
        pair = rule.pair([torch.randn(100, dtype=dtype)], lr=0.1, weight_decay=0.1, **options)
        pair.step()
        pair.new_grads()
        for opt, param in pair.each(0):
            targets = {"grad": param.grad, "param": param.data, **opt.state[param]}
            targets[where][::3] = special
        pair.step_as_is()
        pair.step(2)


@EACH_RULE
def test_several_groups_and_edits(rule, isa):
    groups = [{"params": params()[:3]}, {"params": params()[3:], "lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.3}]
    pair = rule.pair(groups, lr=0.01)
    pair.step(2, missing={0, 4})
    for edit in (
        {"lr": 0.3},
        {"betas": (0.8, 0.95)},
        {"eps": 0.1},
        {"weight_decay": 0.2},
        {"maximize": True},
        {"betas": [0.8, 0.9]},
    ):
        pair.edit(**edit)
        pair.step(2, missing={1})
    pair.both(lambda opt: opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop()))
    pair.step(2)


def tensor_step(entry):
    return float(entry["step"])


@EACH_RULE
def test_counts_that_were_edited_or_stored_otherwise(rule):
    """A step as a Python number is what old checkpoints have; torch converts it where it loads one."""
    pair = rule.pair(params(), lr=0.01)
    pair.step(2)
    for opt in pair.optimizers:
        for index, entry in enumerate(opt.state.values()):
            entry["step"].add_(index)
    pair.step(2)
    for entry in pair.mine.state.values():
        entry["step"] = tensor_step(entry)
    pair.step(1)
    for opt in pair.optimizers:
        for entry in opt.state.values():
            entry["step"] = entry["step"].double()
    pair.step(2)


@EACH_RULE
def test_default_dtype_of_the_counts(rule):
    torch.set_default_dtype(FP64)
    try:
        rule.pair(params(FP64, [(5,)]), lr=0.01).step(3)
    finally:
        torch.set_default_dtype(FP32)


@EACH_RULE
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice(rule):
    param = torch.randn(20)
    pair = rule.pair([param, torch.randn(3), param], lr=0.01)
    pair.step(3)
    pair.step(2, missing={1})


@EACH_RULE
def test_many_counts_in_one_group(rule):
    """Each tensor in a step of its own, and the rows that they need do not grow with the steps."""
    pair = rule.pair([torch.randn(3) for _ in range(40)], lr=0.01)
    for t in range(30):
        pair.step(missing={i for i in range(40) if (i * 7 + t * 3) % (2 + i % 5) == 0})


# ------------------------------------------------------------------------------------------------------- state dicts


@EACH_RULE
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_to_torch_and_back_in_mid_training(rule, ours_first):
    pair = rule.pair(params(), lr=0.01, weight_decay=0.1)
    pair.step(3, missing={2})
    saved = [through_file(opt.state_dict()) for opt in pair.optimizers]
    assert saved[0]["param_groups"][0].keys() == saved[1]["param_groups"][0].keys()
    mine, theirs = pair.optimizers
    for opt, state in ((mine, saved[1]), (theirs, saved[0])) if ours_first else ((theirs, saved[0]), (mine, saved[1])):
        opt.load_state_dict(state)
    pair.check()
    pair.step(3)


@EACH_RULE
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_go_on(rule, copied):
    pair = rule.pair(params(), lr=0.01)
    pair.step(2)
    mine = copied(pair.mine)
    pair.mine = mine
    pair.step(2)


def test_torch_state_dict_of_low_precision():
    opt = FusedAdamW(params(BF16), lr=0.01, state_dtype={"exp_avg": "int8", "exp_avg_sq": BF16}, master_weights=24)
    train(opt)
    theirs = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params(BF16)], lr=0.01)
    theirs.load_state_dict(opt.torch_state_dict())
    assert {key for entry in theirs.state.values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}
    train(theirs)


def train(opt, steps=2):
    for _ in range(steps):
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        opt.step()


# ----------------------------------------------------------------------------------------------------- torch's path


@EACH_RULE
def test_differentiable_goes_through_torchs_step(rule):
    values = params()
    results = []
    for kind in (rule.kind, rule.torch_kind):
        scale = torch.ones(()).requires_grad_()
        mine = [value.clone() * scale for value in values]
        opt = kind(mine, lr=0.01, differentiable=True)
        for _ in range(3):
            for index, param in enumerate(mine):
                torch.manual_seed(index)
                param.grad = torch.randn_like(param) * scale
            opt.step()
        (gradient,) = torch.autograd.grad(sum(param.square().sum() for param in mine), scale)
        results.append([gradient, *mine])
    assert_all_same(*results)


@pytest.mark.parametrize("kind", [FusedAdam, FusedAdamW])
def test_betas_as_tensors_are_torchs(kind):
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    torch_kind = torch.optim.Adam if kind is FusedAdam else torch.optim.AdamW
    pairs = twice(params())
    opts = [
        kind(pairs[0], lr=0.01, betas=betas),
        torch_kind(pairs[1], lr=0.01, betas=betas, foreach=False, fused=False),
    ]
    for _ in range(3):
        new_grads(pairs)
        for opt in opts:
            opt.step()
        assert_all_same(*pairs)


@EACH_RULE
def test_sparse_gradients_are_refused_before_anything_is_written(rule):
    opt = rule.kind([torch.randn(4).requires_grad_(), torch.randn(3, 2).requires_grad_()], lr=0.1)
    train(opt)
    opt.param_groups[0]["params"][0].grad = torch.randn(4)
    opt.param_groups[0]["params"][1].grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
    with refused(opt, RuntimeError, "does not support sparse gradients"):
        opt.step()


@EACH_RULE
def test_capturable_is_refused_on_the_cpu_as_in_torch(rule):
    opt = rule.kind([torch.randn(4).requires_grad_()], lr=0.1, capturable=True)
    opt.param_groups[0]["params"][0].grad = torch.ones(4)
    with refused(opt, AssertionError, "capturable=True"):
        opt.step()


# ----------------------------------------------------------------------------------------------------------- errors


@EACH_RULE
@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1}, {"weight_decay": -1}], ids=str)
def test_the_constructor_refuses_what_torchs_does(rule, options):
    for kind in (rule.kind, rule.torch_kind):
        with pytest.raises(ValueError, match="Invalid"):
            kind([torch.zeros(1).requires_grad_()], **options)


@EACH_RULE
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_state_that_is_not_whole(rule, key):
    opt = rule.kind([torch.randn(4).requires_grad_() for _ in range(2)], lr=0.1)
    train(opt)
    del opt.state[opt.param_groups[0]["params"][1]][key]
    with refused(opt, KeyError, rf"\[1\]: it has no .*{key}"):
        opt.step()


@EACH_RULE
@pytest.mark.parametrize("beta1", [1.0, 1.5, -0.5])
def test_beta1_beyond_what_the_constructor_takes(rule, beta1, isa):
    """OneCycleLR may set it to 1; torch's Adam then divides by 0 on the host."""
    pair = rule.pair([torch.randn(33)], lr=0.01)
    pair.step(2)
    pair.edit(betas=(beta1, 0.9))
    pair.new_grads()
    pair.mine.step()
    with contextlib.suppress(ZeroDivisionError):
        pair.theirs.step()
    for (mine, entry), theirs in zip(pair.mine.state.items(), pair.theirs.state.values(), strict=True):
        assert_same(entry["exp_avg"], theirs["exp_avg"], str(mine.shape))


@EACH_RULE
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_second_moments_fall(rule, dtype):
    """0.1 % in a step is less than half a unit of what is stored, so that rounding to nearest would never let them."""
    roots = []
    for state_dtype in (None, {"exp_avg_sq": dtype}):
        torch.manual_seed(0)
        param = torch.zeros(256).requires_grad_()
        opt = rule.kind([param], lr=1e-3, state_dtype=state_dtype)
        for step in range(2000):
            param.grad = torch.randn(256) if step < 50 else torch.full((256,), 1e-3)
            opt.step()
        roots.append(opt.torch_state_dict()["state"][0]["exp_avg_sq"].float().sqrt().mean())
    torch.testing.assert_close(roots[1], roots[0], rtol=0.05, atol=0)


@EACH_RULE
def test_many_counts_under_a_schedule(rule):
    """A group that is read anew in each step keeps its rows: each tensor finds its own without a search."""
    pair = rule.pair([torch.randn(3) for _ in range(50)], lr=0.01)
    for t in range(12):
        pair.edit(lr=0.01 / (t + 1), betas=(0.9 - 0.01 * t, 0.99))
        pair.step(missing={i for i in range(50) if i % 12 == t or (t < 2 and i % 2)})


@EACH_RULE
@pytest.mark.parametrize("what", ["missing", "None", "momentum"])
def test_a_load_that_fails_changes_nothing(rule, what):
    opt = rule.kind([torch.randn(3).requires_grad_() for _ in range(2)], lr=0.1)
    train(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 77.0
    if what == "missing":
        del saved["state"][1]["step"]
    elif what == "None":
        saved["state"][1]["step"] = None
    else:
        saved["state"] = {0: {"momentum_buffer": torch.zeros(3)}}
    with refused(opt, (ValueError, TypeError), r"step"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("step", [None, "three", torch.tensor([1.0, 2.0])], ids=str)
@EACH_RULE
def test_a_step_that_is_no_number(rule, step):
    opt = rule.kind([torch.randn(3).requires_grad_() for _ in range(2)], lr=0.1)
    train(opt)
    opt.state[opt.param_groups[0]["params"][1]]["step"] = step
    with refused(opt, TypeError, r"step of param_groups\[0\]\['params'\]\[1\]: expected a number"):
        opt.step()


def test_amsgrad_that_is_switched_on_later():
    """torch raises a KeyError, too."""
    opt = FusedAdam([torch.randn(4).requires_grad_()], lr=0.1)
    train(opt)
    opt.param_groups[0]["amsgrad"] = True
    with refused(opt, KeyError, "max_exp_avg_sq"):
        opt.step()


@EACH_RULE
@pytest.mark.parametrize("betas", [0.9, (0.9,), None], ids=str)
def test_betas_that_are_no_pair(rule, betas):
    opt = rule.kind([torch.randn(4).requires_grad_()], lr=0.1)
    train(opt)
    opt.param_groups[0]["betas"] = betas
    with refused(opt, ValueError, r"param_groups\[0\]\['betas'\]: expected a pair of numbers"):
        opt.step()


def test_adamw_has_decoupled_decay():
    with pytest.raises(TypeError, match="decoupled"):
        FusedAdamW([torch.zeros(1)], decoupled_weight_decay=False)


# -------------------------------------------------------------------------------------------- what rides in the pass


@EACH_RULE
def test_clipping(rule):
    pairs = twice(params())
    mine, theirs = rule.kind(pairs[0], lr=0.01, max_grad_norm=1.0), rule.loop(pairs[1], lr=0.01)
    for _ in range(4):
        new_grads(pairs)
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(pairs[1], 1.0)
        theirs.step()
        torch.testing.assert_close(mine.grad_norm, norm)
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EACH_RULE
def test_averages(rule):
    pairs = twice(params())
    mine, theirs = rule.kind(pairs[0], lr=0.01, ema_decay=0.75), rule.loop(pairs[1], lr=0.01)
    averages = None
    for _ in range(4):
        new_grads(pairs)
        mine.step()
        theirs.step()
        news = [b.detach().clone() for b in pairs[1]]
        averages = news if averages is None else [old.lerp(new, 0.25) for old, new in zip(averages, news, strict=True)]
        assert_all_same([mine.state[a]["ema"] for a in pairs[0]], averages)
        assert_all_same(*pairs)
    with mine.ema_weights():
        assert_all_same(pairs[0], averages)


@pytest.mark.parametrize("fused", [False, True])
@EACH_RULE
def test_a_grad_scaler(rule, fused):
    """An overflow leaves everything as it was, the counts too."""
    options = {"fused": True} if fused and rule.name != "nadam" else {}
    pairs = twice(params())
    opts = rule.kind(pairs[0], lr=0.01, **options), rule.loop(pairs[1], lr=0.01)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in opts]
    for t in range(4):
        torch.manual_seed(t)
        grads = [torch.randn_like(v) for v in pairs[0]]
        for opt, mine, scaler in zip(opts, pairs, scalers, strict=True):
            loss = sum((p * g).sum() for p, g in zip(mine, grads, strict=True)) * (math.inf if t == 1 else 1.0)
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        assert_all_same(*pairs)
        for a, b in zip(*pairs, strict=True):
            assert float(opts[0].state[a].get("step", 0)) == float(opts[1].state.get(b, {}).get("step", 0))


@pytest.mark.parametrize(
    "state_dtype",
    [
        BF16,
        {"exp_avg": BF16},
        {"exp_avg_sq": "bfloat16"},
        {"exp_avg": FP16},
        {"exp_avg": "int8"},
        "int8",
        {"exp_avg_sq": "int8"},
        {"exp_avg": "int4"},
        {"exp_avg": "float8_e4m3fn", "exp_avg_sq": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@EACH_RULE
def test_state_dtype(rule, dtype, state_dtype, isa):
    """Close to fp64, in the dtypes that were asked for, and the group has names."""
    values = params(dtype, [(33,), (64, 32)])
    mine = rule.kind(
        [v.clone().requires_grad_() for v in values], lr=1e-2, state_dtype=state_dtype, master_weights=dtype == BF16
    )
    theirs = rule.loop([v.double().requires_grad_() for v in values], lr=1e-2)
    for _ in range(20):
        for a, b in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.to(dtype)
            b.grad = a.grad.double()
        mine.step()
        theirs.step()
    asked = state_dtype if isinstance(state_dtype, dict) else dict.fromkeys(rule.states, state_dtype)
    named = mine.param_groups[0]["state_dtype"]
    assert named == (
        {k: str(v).removeprefix("torch.") for k, v in asked.items()}
        if isinstance(state_dtype, dict)
        else str(state_dtype).removeprefix("torch.")
    )
    for a, b in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.1 if "int4" in str(state_dtype) else 0.02)
        for key in rule.states:
            usual = FP32 if dtype == BF16 else dtype
            wanted = asked.get(key, usual)
            wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
            if wanted == INT4 or (wanted == INT8 and key != "exp_avg"):
                wanted = torch.uint8  # two in a byte, and roots
            assert mine.state[a][key].dtype == wanted
    loaded = rule.kind(
        [a.detach().clone().requires_grad_() for a in mine.param_groups[0]["params"]],
        lr=1e-2,
        state_dtype=state_dtype,
        master_weights=dtype == BF16,
    )
    loaded.load_state_dict(through_file(mine.state_dict()))
    for opt in (mine, loaded):
        torch.manual_seed(7)
        train(opt)
    assert_all_same(mine.param_groups[0]["params"], loaded.param_groups[0]["params"])


@pytest.mark.parametrize(
    "state_dtype",
    [
        "int3",
        "int4",
        FP16,
        "float8_e4m3fn",
        {"exp_avg": torch.int32},
        {"exp_avg_sq": "int4"},
        {"exp_avg_sq": "float16"},
        {"momentum_buffer": BF16},
    ],
    ids=str,
)
@EACH_RULE
def test_state_dtypes_that_there_are_not(rule, state_dtype):
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        rule.kind([torch.zeros(1)], state_dtype=state_dtype)


def test_memory_summary_counts_what_a_step_allocates():
    for rule in RULES:
        opt = rule.kind(
            [v.requires_grad_() for v in params(BF16, [(64, 32)])],
            lr=0.1,
            state_dtype={"exp_avg": "int4", "exp_avg_sq": "int8"},
            master_weights=True,
        )
        before = dict(opt.memory_summary())
        train(opt, 1)
        assert dict(opt.memory_summary()) == before
        entry = opt.state[opt.param_groups[0]["params"][0]]
        for key, tensor in entry.items():
            if tensor.dim():
                assert before[key] == tensor.numel() * tensor.itemsize, key


@EACH_RULE
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_torch_compile(rule, lr, backend):
    """One graph for all steps after the first, whose state is there; the eager step goes on with what it has left."""
    options = {"amsgrad": True} if rule.name == "adam" else {}
    pair = rule.pair(params(), lr=lr, weight_decay=0.1, **options)
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    step = torch.compile(lambda: pair.mine.step(), backend=backend, fullgraph=True)
    for _ in range(5):
        pair.new_grads(missing={2})
        step()
        pair.theirs.step()
        pair.check()
    assert counts["stats"]["unique_graphs"] <= 3
    pair.step(2)


@EACH_RULE
@pytest.mark.parametrize(
    ("options", "is_whole"),
    [({"max_grad_norm": 1.0}, True), ({"state_dtype": "int8"}, False), ({"ema_decay": 0.9}, False)],
    ids=str,
)
def test_options_under_torch_compile(rule, options, is_whole):
    """What is no part of the graph the eager step does, between two graphs."""
    pairs = twice(params())
    opts = [rule.kind(mine, lr=0.01, **options) for mine in pairs]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: opts[1].step(), backend="eager", fullgraph=is_whole)
    for _ in range(3):
        new_grads(pairs)
        opts[0].step()
        compiled()
        assert_all_same(*pairs)


def test_fused_nadam_is_no_adam():
    assert isinstance(FusedNAdam([torch.zeros(1)]), torch.optim.NAdam)
    assert isinstance(FusedAdamW([torch.zeros(1)]), torch.optim.AdamW)
    assert copy.deepcopy(FusedAdam([torch.zeros(1)])).defaults["amsgrad"] is False
