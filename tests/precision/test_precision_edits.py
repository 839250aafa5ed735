"""An edit takes effect once, whole, whatever happens in between: every order of what users do, of length three."""

import copy
import itertools

import pytest
import torch
from precision_twin import Twin
from values import BF16, COPIES, FP32, INT8, dtype_name


def state_dict(twin):
    twin.check_state_dict(twin.opt.state_dict())
    twin.check()


def reload_own(twin):
    twin.load(copy.deepcopy(twin.opt.state_dict()))


ACTIONS = {
    "edit": lambda twin, edit: twin.edit(**edit[0]),
    "take back": lambda twin, edit: twin.edit(**edit[1]),
    "no momentum": lambda twin, _: twin.edit(momentum=0),
    "momentum": lambda twin, _: twin.edit(momentum=0.9),
    "state_dict": lambda twin, _: state_dict(twin),
    **{name: lambda twin, _, copied=copied: twin.move_to(copied(twin.opt)) for name, copied in COPIES.items()},
    "load": lambda twin, _: reload_own(twin),
    "step": lambda twin, _: twin.step(),
}
EDITS = [
    (FP32, {"momentum_dtype": BF16}, {"momentum_dtype": None}),
    (BF16, {"momentum_dtype": INT8, "formulation": "classical"}, {"momentum_dtype": None, "formulation": "torch"}),
    (BF16, {"master_weights": True}, {"master_weights": False}),
    (FP32, {"formulation": "classical", "lr": 0.3}, {"formulation": "torch", "lr": 0.1}),
]


@pytest.mark.parametrize("first", ACTIONS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: "-".join([dtype_name(edit[0]), *edit[1]]))
def test_every_order(edit, first):
    """After each action all state is the oracle's, and so is what a step with momentum then makes of it."""
    dtype, *edit = edit
    values = torch.randn(9).to(dtype)
    for rest in itertools.product(ACTIONS, repeat=2):
        twin = Twin([values], momentum=0.9)
        twin.step()
        try:
            for name in (first, *rest, "momentum", "state_dict", "step"):
                ACTIONS[name](twin, edit)
        except AssertionError as error:
            raise AssertionError(f"{first}, {', '.join(rest)}: {error}") from None
