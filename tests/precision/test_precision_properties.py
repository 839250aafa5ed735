"""Random trainings in low precision, made up by hypothesis: edits, checkpoints, overflows; the oracle's bits always."""

import copy

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from precision_twin import MOMENTUM_DTYPES, Twin, plain_pickle_takes_fp8
from sequences import NEW, SEQUENCES, run_sequences
from values import BF16, COPIES, FP8, FP16, FP32, LAYOUTS, clone_params, in_layout

from momentum_ext import _C, FusedMomentum

STEPS = 10
SHAPES = [(), (0,), (1,), (7,), (9,), (255,), (257,), (1030,), (5, 9), (3, 4, 6), (2, 3, 4, 5), (20_011,)]
DTYPE = st.sampled_from([FP32, BF16, FP16])
CHOICES = {
    "lr": [0.1, 0.01, 0.3, 0.0],
    "momentum": [0.9, 0.5, 1.0, 0.0],
    "dampening": [0.0, 0.3],
    "weight_decay": [0.0, 0.01, 0.2],
    "nesterov": [False, True],
    "maximize": [False, True],
    "decoupled_weight_decay": [False, True],
    "formulation": ["torch", "classical"],
}
PRECISION = st.fixed_dictionaries(
    {
        "momentum_dtype": st.sampled_from(MOMENTUM_DTYPES),
        "master_weights": st.sampled_from([False, True, 24]),
        "stochastic_rounding": st.sampled_from([None, False, True]),
        "rounding_seed": st.sampled_from([0, 1, (1 << 63) - 1]),
    }
)
EDIT = st.sampled_from(list(CHOICES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHOICES[key])))
FACTOR = st.sampled_from([1.0, 1.0, 1e-3, 1e3, 1e-30, float("inf")])


class Training(RuleBasedStateMachine):
    @initialize(
        tensors=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), DTYPE), min_size=1, max_size=4),
        precision=PRECISION,
        seed=st.integers(0, 1 << 30),
    )
    def begin(self, tensors, precision, seed):
        generator = torch.Generator().manual_seed(seed)
        params = [
            in_layout(torch.randn(shape, generator=generator).to(dtype), layout) for shape, layout, dtype in tensors
        ]
        self.has_fp16 = any(param.dtype is FP16 for param in params)
        self.precision = self.possible(precision)
        self.twin = Twin(params, seed=seed, momentum=0.9, **self.precision)
        self.twin.step()

    def possible(self, precision):
        """fp16 parameters have no masters of 24 bits."""
        refused = self.has_fp16 and precision["master_weights"] == 24
        return {**precision, "master_weights": True} if refused else precision

    @rule(dtype=DTYPE, layout=st.sampled_from(LAYOUTS), missing=st.integers(0, 15), factor=FACTOR)
    def step(self, dtype, layout, missing, factor):
        self.twin.new_grads(dtype)
        for index, param in enumerate(self.twin.params):
            grad = param.grad
            if factor == float("inf"):
                grad.view(-1)[: grad.numel() // 3 : 97] = factor
            else:
                grad = grad * factor
            present = not missing >> index & 1 or missing == 15
            param.grad = in_layout(grad, layout) if present else None
        if any(param.grad is not None for param in self.twin.params):
            self.twin.step_as_is()

    @rule(edit=EDIT)
    def edit(self, edit):
        group = self.twin.opt.param_groups[0]
        wanted = {edit[0]: edit[1]}
        after = {"formulation": "torch", **group, **wanted}
        is_torchs = after["formulation"] == "torch" and not after["nesterov"]
        if after["dampening"] and not is_torchs:
            return
        if after["lr"] == 0 and after["formulation"] != self.twin.formulations[0]:
            return  # there is no conversion at that lr
        self.twin.edit(**wanted)

    @rule(precision=PRECISION)
    def edit_precision(self, precision):
        self.precision = self.possible(precision)
        self.twin.edit(**self.precision)

    @rule(way=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copied(self, way):
        twin = self.twin
        dtypes = {value.dtype for entry in twin.entries for value in entry.state.values()}
        if way == "pickle" and FP8 in dtypes and not plain_pickle_takes_fp8():
            way = "deepcopy"
        if way == "state_dict":
            state = copy.deepcopy(twin.opt.state_dict())
            twin.check_state_dict(state)
            options = {"formulation": twin.opt.param_groups[0].get("formulation", "torch"), **self.precision}
            twin.load(state, FusedMomentum(clone_params(twin.params), lr=99.0, **options))
            stochastic, master = self.precision["stochastic_rounding"], self.precision["master_weights"]
            twin.taken *= master == 24 if stochastic is None else stochastic  # saved where it is used
        else:
            twin.move_to(COPIES[way](twin.opt))

    @rule(isa=st.sampled_from(_C.isas()), threads=st.integers(1, 3))
    def machine(self, isa, threads):
        _C.set_isa(isa)
        torch.set_num_threads(threads)

    @rule()
    def overflow(self):
        self.twin.new_grads()
        self.twin.opt.found_inf, self.twin.opt.grad_scale = torch.ones(()), torch.ones(())
        self.twin.opt.step()
        del self.twin.opt.found_inf, self.twin.opt.grad_scale
        self.twin.check()


@SEQUENCES
def test_random_trainings(sequences):
    run_sequences(Training, sequences // 4, STEPS, sequences == NEW)
