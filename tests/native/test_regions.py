"""A step waits for other threads only where memory traffic pays for it: how many parallel regions it enters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent

PROGRAM = """
import ctypes, json, sys, torch
import momentum_ext
from momentum_ext import FusedMomentum

regions = ctypes.CDLL(None).num_regions
regions.restype = ctypes.c_long
torch.set_num_threads(2)

def count(act):
    before = regions()
    act()
    return regions() - before

found = {}
big, small = [1 << 20], [64] * 5000
for name, sizes, options in (
    ("small", small, {}), ("groups", [260] * 465, {}), ("big", big, {}), ("many", [1024] * 1000, {}),
    ("small, average", small, {"ema_decay": 0.9}), ("big, average", big, {"ema_decay": 0.9}),
    ("small, int8", small, {"momentum_dtype": "int8"}), ("big, int8", big, {"momentum_dtype": "int8"}),
):
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": [param]} for param in params] if name == "groups" else params
    optimizer = FusedMomentum(groups, lr=0.1, momentum=0.9, **options)
    optimizer.step()
    found[name] = [count(optimizer.step), count(lambda: optimizer.clip_grad_norm_(1.0)), count(optimizer.step)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    library = tmp_path_factory.mktemp("regions") / "count_regions.so"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", "-o", library, NATIVE / "count_regions.c", "-ldl"], check=True
    )
    env = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["small", "groups", "small, average", "small, int8"])
def test_no_region_for_small_tensors(found, name):
    """Step, clipping, and the step that clips."""
    assert found[name] == [0, 0, 0]


@pytest.mark.parametrize("name", ["big", "many", "big, average", "big, int8"])
def test_one_region_for_each_pass_over_memory(found, name):
    assert found[name] == [1, 1, 1]
