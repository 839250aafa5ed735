"""make gpu-check: no result is lost to a later failure; stand-in commands take the place of what needs a GPU."""

import os
import subprocess
import time

import pytest
import torch
from harness import ROOT, ends

pytest.importorskip("tqdm")


def shell(name, script, seconds=30.0, **options):
    from stages import Stage

    return Stage(name, ("sh", "-c", script), seconds, **options)


def outcomes(folder):
    """The outcomes in summary.txt, by stage."""
    lines = (folder / "summary.txt").read_text().splitlines()[2:]
    return {line.split()[0]: line for line in lines}


def test_no_result_is_lost_to_a_later_failure(programs, tmp_path, capsys):
    from stages import run_stages

    folder = tmp_path / "results"
    pid = tmp_path / "pid"
    stages = [
        shell("first", f"echo '{{}}' > {folder}/first.json; echo all is well"),
        shell("fails", f"echo half > {folder}/fails.json; echo broken >&2; exit 3"),
        shell("hangs", f"echo part > {folder}/hangs.json; sleep 600 & echo $! > {pid}; echo so far; wait", 3.0),
        shell("absent", "exit 1", missing="not installed: ncu"),
        shell("last", f"echo ok > {folder}/last.json; echo the end"),
    ]
    assert run_stages(stages, folder, 60) is False
    found = outcomes(folder)
    assert list(found) == [stage.name for stage in stages]
    assert "passed" in found["first"] and "all is well" in found["first"]
    assert "FAILED (3)" in found["fails"] and "broken" in found["fails"]
    assert "TIMED OUT (3 s)" in found["hangs"] and "so far" in found["hangs"]
    assert "left out" in found["absent"] and "not installed: ncu" in found["absent"]
    assert "passed" in found["last"]
    assert sorted(file.name for file in folder.glob("*.json")) == [
        "fails.json", "first.json", "hangs.json", "last.json"
    ]  # fmt: skip
    log = (folder / "log.txt").read_text()
    assert all(f"==== {name}" in log for name in ("first", "fails", "hangs", "last"))
    assert ends(int(pid.read_text())), "what a stage has started ends with it"
    out = capsys.readouterr().out
    assert "fails: FAILED (3)" in out and out.count("TIMED OUT") == 2, "a line when it happens, and the table"


def test_what_passes_or_is_not_installed_is_no_failure(programs, tmp_path):
    from stages import run_stages

    assert run_stages([shell("one", "true"), shell("two", "false", missing="not installed: ncu")], tmp_path, 60)


def test_without_the_build_nothing_runs(programs, tmp_path):
    from stages import run_stages

    stages = [shell("build", "echo no compiler; exit 1", required=True), shell("tests", f"touch {tmp_path}/ran")]
    assert run_stages(stages, tmp_path, 60) is False
    found = outcomes(tmp_path)
    assert "FAILED (1)" in found["build"] and "left out" in found["tests"] and "build: FAILED" in found["tests"]
    assert not (tmp_path / "ran").exists()


def test_the_whole_check_ends_in_its_time(programs, tmp_path):
    from stages import GRACE_SECONDS, run_stages

    start = time.monotonic()
    stages = [shell("long", "sleep 600", 600.0), shell("next", "true"), shell("after", "true")]
    assert run_stages(stages, tmp_path, GRACE_SECONDS + 2) is False
    assert time.monotonic() - start < GRACE_SECONDS + 10
    found = outcomes(tmp_path)
    assert "TIMED OUT (2 s)" in found["long"] and "no time is left" in found["next"] and "no time" in found["after"]


def test_a_command_that_is_not_there(programs, tmp_path):
    from stages import Stage, run_stages

    assert run_stages([Stage("gone", ("/no/such/program",), 5.0)], tmp_path, 60) is False
    assert "No such file" in outcomes(tmp_path)["gone"]


@pytest.fixture
def h100(programs):
    from gpu_check import Machine

    tools = {"compute-sanitizer": "/cuda/bin/compute-sanitizer", "ncu": "/cuda/bin/ncu"}
    return Machine("NVIDIA H100 80GB HBM3", "9.0", 16, frozenset({"pytest", "xdist", "tqdm"}), tools)


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "long"])
def test_the_stages_are_commands_that_their_programs_take(h100, monkeypatch, tmp_path, quick):
    import bench_step
    import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stages = gpu_check.plan(h100, tmp_path / "2026-11-27-h100", quick)
    assert stages[0].name == "build" and stages[0].required
    assert stages[0].env == {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    files = []
    for stage in stages:
        assert not stage.missing
        if "benchmarks/bench_step.py" in stage.command:
            options = bench_step.parse_arguments(stage.command[2:])
            assert options.device == "cuda" and options.quick == quick
            files.append(options.json.name)
        if "pytest" in stage.command:
            assert stage.env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert files[0] == "2026-11-27-h100.json" and len(set(files)) == len(files)
    assert files[1:] == [f"2026-11-27-h100-{n}.json" for n in ("precision", "clip", "amp_clip", "ema", "busy")]
    tests = (ROOT / "tests" / "cuda" / "test_cuda.py").read_text()
    assert all(f"def {name}" in tests for name in (*gpu_check.QUICK_SANITIZED, *gpu_check.SANITIZED))


def test_quick_fits_its_time(h100, tmp_path):
    import gpu_check

    stages = gpu_check.plan(h100, tmp_path / "x", quick=True)
    early = sum(stage.seconds for stage in stages if stage.name in ("build", "tests", "step", "precision"))
    assert early <= gpu_check.QUICK_SECONDS - 60, "the most telling stages run even where each takes all its time"


def test_the_tests_that_need_a_gpu_are_collected_without_plugins(h100, tmp_path):
    """As on a machine whose Python has pytest alone: no hypothesis, no pytest-timeout, no pytest-xdist."""
    import gpu_check

    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import sys\nfor name in ('hypothesis', 'pytest_timeout', 'xdist'): sys.modules[name] = None\n"
    )
    bare = gpu_check.Machine("H100", "9.0", 16, frozenset({"pytest", "tqdm"}), {})
    tests = next(stage for stage in gpu_check.plan(bare, tmp_path / "x", quick=True) if stage.name == "tests")
    assert "-n" not in tests.command
    env = {**os.environ, **tests.env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["PYTHONPATH"] = f"{blocked}{os.pathsep}{env['PYTHONPATH']}"
    result = subprocess.run([*tests.command, "--collect-only"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_layouts" in result.stdout


def test_dry_run_says_what_it_would_do_and_does_nothing(programs, tmp_path, capsys):
    import gpu_check

    assert gpu_check.main(["--quick", "--dry-run", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "setup.py -q build_ext --inplace" in out and "--hogs" in out and "--precision" in out
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_its_plan(h100, monkeypatch, tmp_path):
    import gpu_check

    stand_in = [shell("build", f"echo built > {tmp_path}/out/built"), shell("tests", "echo 81 passed; exit 1")]
    monkeypatch.setattr(gpu_check.Machine, "here", classmethod(lambda cls: h100))
    monkeypatch.setattr(gpu_check, "plan", lambda machine, prefix, quick: stand_in)
    assert gpu_check.main(["--quick", "--output", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "built").exists() and "81 passed" in outcomes(tmp_path / "out")["tests"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"built", "log.txt", "summary.txt"}
