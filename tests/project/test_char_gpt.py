"""examples/train_char_gpt.py, killed with SIGKILL and resumed, gives an uninterrupted run's losses, bit for bit."""

import signal
import sys

import pytest
import torch
from harness import ROOT, run_program

EXAMPLES = ROOT / "examples"
STEPS = 30
CHECKPOINT_EVERY = 8
RUNS = {
    "torch": "torch",
    "classical": "classical",
    "ema": "ema",
    "torch-nesterov": "torch, Nesterov",
    "adamw": "AdamW",
    "nadam": "NAdam",
}

# Kills itself after so many of its own steps, or when it is about to move so many checkpoints of a run into place.
PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
from torch.optim.optimizer import register_optimizer_step_post_hook
import train_char_gpt

what, count = sys.argv[1], int(sys.argv[2])
replace = os.replace

def count_down():
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counting_replace(source, target):
    if os.path.basename(target) == what:
        count_down()
    replace(source, target)

if what == "step":
    register_optimizer_step_post_hook(lambda *_: count_down())
os.replace = counting_replace
sys.exit(train_char_gpt.main(sys.argv[3:]))
"""


def train(directory, what="nothing", count=0, **changes):
    options = {"steps": STEPS, "checkpoint-every": CHECKPOINT_EVERY, **changes}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", PROGRAM, what, count, "--quick", f"--directory={directory}", *arguments]
    return run_program(*command, env={"OMP_NUM_THREADS": "1"})


def steps_done(checkpoint):
    return len(torch.load(checkpoint, weights_only=True)["losses"])


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = train(whole)
    assert result.returncode == 0, result.stderr
    assert all(f"---- {label} writes ----" in result.stdout for label in RUNS.values()), result.stdout
    assert (whole / "char_gpt.png").stat().st_size > 10_000

    # In the second run, between two checkpoints.
    result = train(killed, "step", STEPS + 21)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert steps_done(killed / "torch.pt") == STEPS
    assert steps_done(killed / "classical.pt") == 16
    assert not (killed / "classical.csv").exists()

    # With a checkpoint written and not yet in its place: the one before is whole.
    result = train(killed, "ema.pt", 3)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert "classical: goes on from step 16" in result.stderr + result.stdout
    assert steps_done(killed / "ema.pt") == 16
    assert steps_done(killed / "ema.pt.new") == 24

    # With Nesterov's momentum, after a look at the held-out text.
    result = train(killed, "step", (STEPS - 16) + 13)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert steps_done(killed / "torch-nesterov.pt") == 8

    result = train(killed)
    assert result.returncode == 0, result.stderr
    for name in RUNS:
        assert (killed / f"{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes(), name
        one, other = (torch.load(where / f"{name}.pt", weights_only=True) for where in (whole, killed))
        assert one["validation"] == other["validation"]
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])

    lines = (whole / "torch.csv").read_text().splitlines()
    assert len(lines) == 1 + STEPS
    assert lines[1].split(",")[0] == "1"

    # A checkpoint of another run is refused, and left as it is.
    result = train(killed, lr=0.1)
    assert result.returncode == 1
    assert "lr: found 0.3, expected 0.1" in result.stderr
    assert "--restart" in result.stderr
    assert steps_done(killed / "torch.pt") == STEPS
