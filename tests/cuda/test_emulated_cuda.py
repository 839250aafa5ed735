"""The tests of CUDA devices on devices that are not there: the binding's CUDA path, from param_groups to the last
element.

The extension is built a second time, its kernels compiled for the host, and the tests run in a process of their own
that imports that build. It needs a torch without CUDA.
"""

import sys

import pytest
import torch
from harness import TESTS, run_program


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="it stands in for CUDA in a torch without CUDA")
def test_in_a_process_of_its_own(tmp_path):
    made = run_program(sys.executable, TESTS / "emulated_cuda/build.py", tmp_path, timeout=900)
    assert made.returncode == 0, (made.stdout + made.stderr)[-5000:]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not cuda"]
    files = [TESTS / "cuda/test_cuda.py", TESTS / "cuda/test_adaptive_cuda.py"]
    done = run_program(*command, *files, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
