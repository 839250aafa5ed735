"""The benchmark: what cannot run costs its own row, and every pass has a memory limit of its own bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, ends

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def fake(monkeypatch, name, build, tensors, elements):
    """Puts a workload of that name beside the real ones."""
    import workloads

    monkeypatch.setitem(workloads._BUILDERS, name, build)
    monkeypatch.setitem(workloads.EXPECTED, name, (tensors, elements))
    monkeypatch.setattr(workloads, "NAMES", tuple(workloads._BUILDERS))


QUICK = ["--quick", "--repeats", "2", "--threads", "1"]


@pytest.mark.parametrize("mode", [[], ["--precision"], ["--pipeline", "clip"]], ids=["step", "precision", "clip"])
def test_a_workload_that_cannot_run_costs_its_own_row(programs, monkeypatch, tmp_path, capsys, mode):
    import bench_step
    import report
    import workloads

    def raises():
        raise ValueError("no such shapes")

    def huge():
        return workloads.Workload("huge", "too much", "made up", workloads.one_group([(2**40,)]))

    fake(monkeypatch, "raises", raises, 1, 1)
    fake(monkeypatch, "huge", huge, 1, 2**40)
    file = tmp_path / "step.json"
    names = [word for name in ("raises", "huge", "small_200x16") for word in ("--workload", name)]
    assert bench_step.main([*QUICK, *mode, *names, "--json", str(file)]) == 1, "raises has failed"
    found = report.load(file)
    reasons = {entry.workload: entry.reason for entry in found.left_out}
    assert reasons["raises"] == "failed: ValueError: no such shapes"
    if mode == ["--precision"]:
        too_big, done = found.precisions
        assert all("GB of memory" in row.reason for row in too_big.rows if row.mode not in ("bf16-fused", "limit"))
        assert done.row("fp32") and done.row("bf16")
    else:
        (done,) = found.workloads
        assert "not run: it needs" in reasons["huge"] and "GB of memory" in reasons["huge"]
        assert done.row("ours") and done.row("default")
    assert done.workload == "small_200x16"
    captured = capsys.readouterr()
    assert "huge" in captured.out and "FAILED: raises" in captured.err


def test_running_out_of_memory_costs_one_row(programs, monkeypatch, tmp_path):
    import bench_step
    import contenders
    import measure
    import report

    def build(model, settings):
        torch.empty(2**60)

    crowd = (*contenders.CONTENDERS[:2], contenders.Contender("fused", "torch fused", build))
    monkeypatch.setattr(measure, "CONTENDERS", crowd)
    file = tmp_path / "step.json"
    assert bench_step.main([*QUICK, "--workload", "small_200x16", "--json", str(file)]) == 0
    (entry,) = report.load(file).workloads
    assert entry.row("ours") and entry.row("default") and entry.row("fused") is None
    assert entry.rows[-1].reason.startswith("not run: out of memory: ")


def test_what_fits_into_80_gb_is_known_before(programs, monkeypatch):
    """An H100 has no room for a second copy of Llama 3 8B, nor for a copy of as many bytes as its step moves."""
    import measure
    import precision
    import workloads
    from contenders import STEP, NotRun

    monkeypatch.setattr(measure, "fits_in_caches", lambda workload, device: False)
    monkeypatch.setattr(precision, "fault_of_fused", lambda workload, settings: None)

    def room(name, gb):
        workload = workloads.build(name)
        monkeypatch.setattr(measure, "free_bytes", lambda device: gb * 1e9)
        return measure.room_for_models(workload, STEP.traffic(workload.itemsize), "cuda")

    assert room("llama3_8b", 84) == 1
    assert room("gpt2_xl", 84) == 3
    assert room("gpt2", 84) > len(measure.CONTENDERS)
    with pytest.raises(NotRun, match=r"not run: it needs 52.5 GB of memory, 50.0 are free"):
        room("llama3_8b", 50)

    reasons = {}
    batches = precision.in_batches(workloads.build("llama3_8b"), "cuda", 0.9 * 84e9, reasons)
    wide = ["fp32", "bf16-momentum", "int8-momentum", "fp8-momentum"]
    alone = [[mode.key] for mode in precision.MODES if mode.key not in wide]
    assert [[mode.key for mode in batch] for batch in batches] == alone
    assert list(reasons) == wide and "it needs 96.4 GB of memory, 75.6 are usable" in reasons["fp32"]
    (everything,) = precision.in_batches(workloads.build("gpt2"), "cuda", 0.9 * 84e9, {})
    assert everything == list(precision.MODES)


def test_a_file_is_there_before_the_run_has_ended(programs, monkeypatch, tmp_path):
    import bench_step
    import report

    def interrupted():
        assert [entry.workload for entry in report.load(file).workloads] == ["small_200x16"]
        raise KeyboardInterrupt

    fake(monkeypatch, "interrupted", interrupted, 1, 1)
    file = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        bench_step.main([*QUICK, "--workload", "small_200x16", "--workload", "interrupted", "--json", str(file)])
    assert report.load(file).workloads[0].row("ours")


def test_workloads_in_16_bit_and_mismatched_layouts(programs):
    from contenders import Model, Settings, fault_of_fused
    from workloads import Workload, one_group

    def workload(**options):
        return Workload("w", "w", "w", one_group([(8, 4, 3, 5), (6, 7), (9,)]), **options)

    def params(**options):
        return Model.random(workload(**options), Settings()).copy().params

    image, matrix, vector = params(grad_layout="channels_last")
    assert image.is_contiguous() and image.grad.is_contiguous(memory_format=torch.channels_last)
    assert not image.grad.is_contiguous() and matrix.grad.is_contiguous() and vector.grad.is_contiguous()
    image, matrix, _ = params(grad_layout="transposed")
    assert matrix.is_contiguous() and matrix.grad.stride() == (1, 6) and image.grad.is_contiguous()
    assert {dtype for p in params(dtype="bfloat16") for dtype in (p.dtype, p.grad.dtype)} == {torch.bfloat16}
    # Torch's fused step is wrong in both cases: README.md
    assert fault_of_fused(workload(dtype="bfloat16"), Settings())
    assert fault_of_fused(workload(grad_layout="channels_last"), Settings())
    assert fault_of_fused(workload(), Settings()) is None


@pytest.mark.parametrize(
    "updated, read, before, moved",
    [((4, 4), (4,), False, 20), ((4, 4), (4,), True, 24), ((4, 4, 4), (4,), False, 28), ((2, 2), (2,), False, 10),
     ((2, 2, 2), (2,), False, 14), ((4, 1), (4,), False, 14)],
)  # fmt: skip
def test_memory_limit_goes_over_the_bytes_of_its_pass(programs, updated, read, before, moved):
    from memory_limit import MemoryLimit, Traffic, make_arena

    traffic = Traffic(updated, read, before)
    assert traffic.moved == moved and traffic.held == sum(updated) + sum(read)
    for elements in (1, 64, 10_001):
        arena = make_arena([traffic], elements)
        MemoryLimit(traffic, elements, 1, arena)
        # It has taken one step: an updated word is half of what it was plus what was read; the rest is untouched.
        lines, begin = -(-elements // 64), 0
        for size in updated:
            words = arena[begin : begin + lines * 16 * size].view(lines, size, 16)
            expected = 0.005 + 0.01 * (torch.arange(size) < read[0]).float()
            torch.testing.assert_close(words, expected[None, :, None].expand_as(words))
            begin += lines * 16 * size
        assert (arena[begin:] == 0.01).all() and arena.numel() - begin == lines * 16 * sum(read)


def test_busy_processes_end_with_the_block_and_with_their_parent(programs):
    from hogs import hogs

    def children(pid):
        return {
            int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
        }

    before = children(os.getpid())
    with hogs(2):
        started = children(os.getpid()) - before
        assert len(started) == 2
    assert not started & children(os.getpid())
    code = "import os, signal, hogs\nwith hogs.hogs(1): print(flush=True); signal.pause()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE)
    with parent:
        parent.stdout.readline()
        (orphan,) = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert ends(orphan)


def test_results_kept_here_can_be_read_and_drawn(programs, tmp_path):
    import plot
    import report
    import tables

    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert len(files) >= 10
    for file in files:
        found = report.load(file)
        texts = [tables.header_text(found), *map(tables.entry_text, (*found.workloads, *found.precisions))]
        assert all("target" not in text for text in texts)
    for name in ("clip", "precision"):
        plot.draw(report.load(ROOT / f"benchmarks/results/2026-11-26-h100-80gb-{name}.json"), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
