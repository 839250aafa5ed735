"""Adaptive rules on DTensors: each rank's shards have the bits of plain tensors; checkpoints go to torch and back."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from adaptive import RULES
from test_ranks import assert_shard, placed_state
from test_resharding import COLUMNS, FSDP2, PLAIN, REPLICAS, ROWS, SHAPES, TWO_RANKS, Training
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from momentum_ext import FusedAdamW

BY_NAME = {rule.name: rule for rule in RULES}
LAYOUTS = {"rows": TWO_RANKS, "columns": COLUMNS, "replicas": REPLICAS, "fsdp2": FSDP2}
BF16 = torch.bfloat16
MODES = {
    "fp32": {},
    "clipped average": {"max_grad_norm": 0.5, "ema_decay": 0.9},
    "24 bits": {"dtype": BF16, "master_weights": 24, "state_dtype": "int8", "shapes": ROWS},
    "fp8 and bf16": {"state_dtype": {"exp_avg": "float8_e4m3fn", "exp_avg_sq": "bfloat16"}, "shapes": ROWS},
    "at random": {"dtype": BF16, "stochastic_rounding": True, "rounding_seed": 3},
}


class AdaptiveTraining(Training):
    def __init__(self, layout, make, shapes=SHAPES, **options):
        hyper = {"lr": 0.01, "momentum": None, "dampening": None, **options}
        super().__init__(layout, lambda params, **given: make(params, **without_none(given)), shapes=shapes, **hyper)

    def check(self, make, **options):
        """Against plain tensors that were never interrupted."""
        wanted = AdaptiveTraining(PLAIN, make, **options).steps(0, 7)
        for mine, theirs in zip(self.model.parameters(), wanted.model.parameters(), strict=True):
            assert_close = "max_grad_norm" in options  # norms add up in another order
            found, expected = placed_state(mine, self.opt.state[mine]), wanted.opt.state[theirs]
            assert set(found) == set(expected)
            if assert_close:
                torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-5, atol=1e-6)
                continue
            assert_shard(mine, theirs)
            for key, value in expected.items():
                if key in ("step", "mu_product"):
                    assert type(found[key]) is torch.Tensor
                    assert float(found[key]) == float(value)
                else:
                    assert_shard(found[key], value, key)


def without_none(options):
    return {key: value for key, value in options.items() if value is not None and key != "nesterov"}


def train(name, layout, mode):
    make, options = BY_NAME[name].kind, MODES[mode]
    AdaptiveTraining(LAYOUTS[layout], make, **options).steps(0, 7).check(make, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BY_NAME)
def test_training(two_ranks, name, layout, mode):
    two_ranks.run(train, name, layout, mode)


def reshard(mode, flatten, folder):
    options = MODES[mode]
    saving = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = AdaptiveTraining(TWO_RANKS, FusedAdamW, **options).steps(0, 3)
    dcp.save(state_of(saved, saving), checkpoint_id=folder)
    loaded = AdaptiveTraining(COLUMNS, FusedAdamW, **options)
    state = state_of(loaded, saving)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(loaded.model, state["model"])
    set_optimizer_state_dict(loaded.model, loaded.opt, state["optimizer"], options=saving)
    loaded.steps(3, 7).check(FusedAdamW, **options)


def state_of(training, options):
    return {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.opt, options=options),
    }


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("mode", ["fp32", "24 bits", "fp8 and bf16", "at random"])
def test_resharding(two_ranks, mode, flatten, tmp_path):
    two_ranks.run(reshard, mode, flatten, str(tmp_path))


def to_torch_and_back(name, back):
    rule = BY_NAME[name]
    first, second = (rule.kind, rule.loop) if back else (rule.loop, rule.kind)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved, loaded = AdaptiveTraining(TWO_RANKS, first), AdaptiveTraining(TWO_RANKS, second)
    saved.steps(0, 3)
    state = get_optimizer_state_dict(saved.model, saved.opt, options=options)
    set_model_state_dict(loaded.model, get_model_state_dict(saved.model))
    set_optimizer_state_dict(loaded.model, loaded.opt, state, options=options)
    loaded.steps(3, 7)
    wanted = AdaptiveTraining(PLAIN, rule.kind).steps(0, 7)
    for mine, theirs in zip(loaded.model.parameters(), wanted.model.parameters(), strict=True):
        # torch's loop on DTensors has torch's own square root.
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
@pytest.mark.parametrize("name", BY_NAME)
def test_torchs_optimizers(two_ranks, name, back):
    two_ranks.run(to_torch_and_back, name, back)
