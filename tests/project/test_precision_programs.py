"""The programs that measure the low-precision modes: the error table lines up, the benchmark computes what it says."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_error_table(programs, tmp_path, capsys):
    import precision_error

    assert precision_error.main(["--steps", "20", "--output", str(tmp_path / "errors.png")]) == 0
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    rule = next(line for line in lines if line.startswith("---"))
    rows = [line for line in lines if line.startswith(("fp32", "bf16", "fp16")) and "e-" in line]
    assert len(rows) == len(precision_error.MODES) and all(len(row) <= len(rule) for row in rows)
    assert "bf16 split, fp32 momentum: the bits of fp32" in lines


def test_benchmark_of_the_modes(programs, tmp_path):
    import bench_step
    import report

    file = tmp_path / "precision.json"
    arguments = ["--precision", "--workload", "small_200x16", "--repeats", "2", "--threads", "1", "--json", str(file)]
    assert bench_step.main([*arguments, "--plot", str(tmp_path / "precision.png")]) == 0
    (entry,) = report.load(file).precisions
    assert {row.mode for row in entry.rows} >= {"fp32", "bf16-momentum", "int8-momentum", "split", "bf16-sr"}
    assert all(row.median_ms or row.reason for row in entry.rows)
    assert entry.row("fp32").moved_bytes == 20 and entry.row("split").moved_bytes == 14
    assert entry.row("split").difference > 0, "bf16 cannot have the bits of fp32"
    assert torch.get_num_threads() == 1


def test_stalls(programs, monkeypatch, capsys):
    """Rounded by chance, 24 bits lose nothing at rates where bf16 alone loses nearly all."""
    import precision_stalls

    monkeypatch.setattr(precision_stalls, "STEPS", 100)
    monkeypatch.setattr(precision_stalls, "N", 20_000)
    precision_stalls.main()
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(precision_stalls.MODES)
    missing = {line[:46].rstrip(): float(line.split()[-4]) for line in lines[1:]}  # at 1e-6
    assert abs(missing["master_weights=24"]) < 0.1 and missing["bf16 alone"] > 50


def test_blocks_have_at_most_a_tenth_more_error_than_flashoptims(programs, capsys):
    import precision_blocks

    precision_blocks.main()
    rows = [
        [float(each.replace(",", "")) for each in line.split()[-5:]]
        for line in capsys.readouterr().out.splitlines()[1:]
    ]
    _, peer, mine, *_ = rows
    assert all(a <= 1.1 * b for a, b in zip(mine[:4], peer[:4], strict=True)) and mine[4] < 30


def test_overview(programs, tmp_path, capsys):
    """In the bytes of FlashOptim's formats ours has no larger error, and loses nothing of the way."""
    import precision_overview

    precision_overview.main(tmp_path / "overview.png", steps=200)
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:30].rstrip(): line[30:].split() for line in lines if " %" in line and "missing" not in line}
    assert list(rows) == [mode.name for mode in precision_overview.MODES]
    mine, peer = rows["bf16 24 bits, int8 momentum"], rows["FlashOptim's formats"]
    assert mine[0] == peer[0] == "6.06" and float(mine[1]) <= 1.1 * float(peer[1]) and mine[2] == "0.0"
    assert (tmp_path / "overview.png").stat().st_size > 10_000
