"""The first call of a process may happen under any mode: no crash, no lost update, and no slowness afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from modes_program import MODES


@pytest.fixture(scope="module")
def results():
    program = Path(__file__).with_name("modes_program.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("mode", MODES)
def test_first_call(mode, results):
    assert results[mode] == ""
