"""Runs commands one after the other, each with a time limit, so that no result is lost to what comes after it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tables import aligned

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "FAILED", "TIMED OUT", "left out"
GRACE_SECONDS = 5.0
"""Between asking a command that has had its time to stop and ending it."""


@dataclass(frozen=True)
class Stage:
    """A command, run in the source tree; what it prints goes to log.txt as it comes."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Its time limit."""
    env: Mapping[str, str] = field(default_factory=dict)
    required: bool = False
    """Whether nothing that follows means anything without it."""
    missing: str = ""
    """Why it cannot run here; empty where it can."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    outcome: str
    seconds: float
    note: str
    """Its last line of output, or why it was left out."""


def run_stage(stage: Stage, folder: Path, limit: float) -> Outcome:
    """Runs the stage for at most `limit` seconds, with all processes that it starts."""
    start = time.monotonic()
    log = folder / "log.txt"
    with log.open("ab") as output:
        output.write(f"\n==== {stage.name}\n".encode())
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env={**os.environ, **stage.env}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(stage.name, FAILED, 0.0, str(error))
        try:
            status = process.wait(limit)
            outcome = PASSED if status == 0 else f"{FAILED} ({status})"
        except subprocess.TimeoutExpired:
            outcome = f"{TIMED_OUT} ({limit:.0f} s)"
        finally:
            end_group(process)
    return Outcome(stage.name, outcome, time.monotonic() - start, last_line(log, begin))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and whatever it has started: by request, then by force."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(log: Path, begin: int) -> str:
    """The last line from there on that says something, shortened; nothing where there is none."""
    text = log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:80] if lines else ""


def run_stages(stages: Sequence[Stage], folder: Path, seconds: float) -> bool:
    """Runs all stages, `seconds` in all, and keeps the table of their outcomes in summary.txt up to date.

    Returns whether all that can run here have passed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    failed = ""
    for stage in stages:
        left = deadline - time.monotonic() - GRACE_SECONDS
        reason = stage.missing or failed or ("" if left > 1 else "no time is left")
        if reason:
            outcome = Outcome(stage.name, LEFT_OUT, 0.0, reason)
        else:
            print(f"==== {stage.name}, at most {min(stage.seconds, left):.0f} s", flush=True)
            outcome = run_stage(stage, folder, min(stage.seconds, left))
        outcomes.append(outcome)
        print(f"     {stage.name}: {outcome.outcome}, {outcome.seconds:.0f} s. {outcome.note}", flush=True)
        if stage.required and outcome.outcome != PASSED:
            failed = f"{stage.name}: {outcome.outcome}"
        (folder / "summary.txt").write_text(table(outcomes) + "\n")
    print(f"\n{table(outcomes)}")
    return all(each.outcome == PASSED or stage.missing for stage, each in zip(stages, outcomes, strict=True))


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each stage."""
    rows = [[each.name, each.outcome, f"{each.seconds:.0f}"] for each in outcomes]
    lines = aligned(("stage", "outcome", "s"), rows, left=2).splitlines()
    notes = ["last line, or why", "", *(each.note for each in outcomes)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))
