"""The first call of a process may happen under any mode: no crash, no lost update, and no slowness afterwards."""

import json
import os
import sys

import pytest
from harness import TESTS, run_program
from modes_program import MODES


@pytest.fixture(scope="module")
def results():
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_program(sys.executable, TESTS / "trainers/modes_program.py", env={"PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("mode", MODES)
def test_first_call(mode, results):
    assert results[mode] == ""
