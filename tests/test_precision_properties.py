"""Random trainings in low precision, made up by hypothesis: edits, checkpoints, overflows; the oracle's bits always."""

import copy
import pickle

import torch
from helpers import LAYOUTS, clone_params, in_layout
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from precision_twin import BF16, FP8, FP16, FP32, MOMENTUM_DTYPES, Twin
from sequences import NEW, SEQUENCES, run_sequences
from test_precision_checkpoints import plain_pickle_takes_fp8

from momentum_ext import _C, FusedMomentum

STEPS = 10
SHAPES = [(), (0,), (1,), (7,), (9,), (255,), (257,), (1030,), (5, 9), (3, 4, 6), (2, 3, 4, 5), (20_011,)]
DTYPE = st.sampled_from([FP32, BF16, FP16])
CHOICES = {
    "lr": [0.1, 0.01, 0.3, 0.0],
    "momentum": [0.9, 0.5, 1.0],
    "dampening": [0.0, 0.3],
    "weight_decay": [0.0, 0.01, 0.2],
    "nesterov": [False, True],
    "maximize": [False, True],
    "decoupled_weight_decay": [False, True],
}
PRECISION = st.fixed_dictionaries(
    {
        "momentum_dtype": st.sampled_from(MOMENTUM_DTYPES),
        "master_weights": st.booleans(),
        "stochastic_rounding": st.booleans(),
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
        self.precision = precision
        self.twin = Twin(params, seed=seed, momentum=0.9, **precision)
        self.twin.step()
        self.is_counted = precision["stochastic_rounding"]

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
            param.grad = in_layout(grad, layout) if present or self.twin.entries[index].edited else None
        if any(param.grad is not None for param in self.twin.params):
            self.twin.step_as_is()

    @rule(edit=EDIT)
    def edit(self, edit):
        group = self.twin.opt.param_groups[0]
        wanted = {edit[0]: edit[1]}
        if (wanted.get("dampening") and group["nesterov"]) or (wanted.get("nesterov") and group["dampening"]):
            return
        self.twin.edit(**wanted)

    @rule(precision=PRECISION, dtype=DTYPE)
    def edit_precision(self, precision, dtype):
        self.precision = precision
        self.twin.edit(**precision)
        self.twin.step(dtype=dtype)

    @rule(way=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copied(self, way):
        twin = self.twin
        if way == "pickle" and self.precision["momentum_dtype"] is FP8 and not plain_pickle_takes_fp8():
            way = "deepcopy"
        if way == "state_dict":
            state = copy.deepcopy(twin.opt.state_dict())
            twin.params = clone_params(twin.params)
            twin.opt = FusedMomentum(twin.params, lr=99.0, **self.precision)
            twin.opt.load_state_dict(state)
        else:
            both = (twin.params, twin.opt)
            twin.params, twin.opt = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        for param in twin.params:
            param.grad_dtype = None
        # A checkpoint has the number of steps from when stochastic rounding was first on; else counting starts anew.
        self.is_counted |= self.precision["stochastic_rounding"]
        if way == "state_dict":
            twin.taken *= self.is_counted
        twin.check()

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
