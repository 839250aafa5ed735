"""How many sequences of random actions a run tries: few in make test, 2,000 in make test-all, always the same; 20,000
new ones in make soak."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

NEW = 20_000
SEQUENCES = pytest.mark.parametrize(
    "sequences",
    [
        160,
        pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(NEW, marks=[pytest.mark.soak, pytest.mark.timeout(4 * 3600)]),
    ],
)


def run_sequences(machine, count, steps, is_new):
    """So many sequences of at most so many actions; those that are not new are the same on every run."""
    wanted = settings(max_examples=count, stateful_step_count=steps)
    run_state_machine_as_test(machine, settings=settings(wanted, derandomize=False) if is_new else wanted)
