"""accelerate's FSDP2 plugin, which puts DTensors into an optimizer that was made of plain parameters."""

import os

import pytest
import torch
from harness import assert_all_same, for_loop
from test_ranks import HYPER, model_of
from test_wrappers import batch

from momentum_ext import FusedMomentum

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def train(make, folder, saves):
    """Parameters after six steps, with a state that is saved after three and loaded back after five."""
    import accelerate

    for prefix in ("", "LOCAL_"):
        os.environ[f"{prefix}RANK"] = str(torch.distributed.get_rank())
        os.environ[f"{prefix}WORLD_SIZE"] = str(torch.distributed.get_world_size())
    os.environ["OMP_NUM_THREADS"] = "1"
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_ram_efficient_loading=False
    )
    kind = accelerate.utils.DistributedType.FSDP  # accelerate itself takes the plugin on accelerators only
    accelerate.state.PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = kind
    model = model_of()
    model, optimizer = accelerator.prepare(model, make(model.parameters()))

    def step(k):
        optimizer.zero_grad()
        accelerator.backward(model(batch(k)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    for k in range(6):
        step(k)
        if saves and k == 2:
            accelerator.save_state(folder)
        if saves and k == 4:
            accelerator.load_state(folder)
            step(3)
            step(4)
    assert all(hasattr(param, "placements") for param in optimizer.param_groups[0]["params"])
    return [param.detach().full_tensor() for param in model.parameters()]


def compared(folder, options):
    kinds = {
        "sgd": lambda params: for_loop(params, **HYPER),
        "ours": lambda params: FusedMomentum(params, **HYPER, **options),
    }
    found = train(kinds["ours"], f"{folder}/ours", saves=True)
    other = kinds["ours" if options else "sgd"]
    for saves in (False, not options):
        assert_all_same(found, train(other, f"{folder}/other{saves}", saves=saves))
    assert any(not torch.equal(mine, first) for mine, first in zip(found, model_of().parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "momentum_dtype": "bfloat16"}], ids=str)
def test_fsdp2_plugin(two_ranks, tmp_path, options):
    two_ranks.run(compared, str(tmp_path), options)
