"""What a step costs the host when parameters are DTensors: beside the same shards as plain tensors, and torch's steps.

    python benchmarks/bench_dtensors.py                    # on one rank and on two
    python benchmarks/bench_dtensors.py --ranks 2 --json dtensors.json

Contenders take turns, on one thread for each rank, with shards of 16 elements. "new" gives every parameter a new
gradient before each step, off the clock, as FSDP2 does. Medians over the rounds, of the slower rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import describe
from tables import aligned
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm

from momentum_ext import FusedMomentum

ELEMENTS = 16  # of each rank's shard
HYPER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
SECONDS = 0.4  # for each contender in all
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclass(frozen=True)
class Contender:
    label: str
    distributed: bool
    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    clip: Callable[[Any], object] | None = None


def _ours(**options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: FusedMomentum(params, **HYPER, **options)


def _torch(foreach: bool) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, **HYPER, foreach=foreach)


def _clip_by_torch(optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


def _clip(optimizer: FusedMomentum) -> None:
    optimizer.clip_grad_norm_(1.0)


CONTENDERS = [
    Contender("plain tensors", False, _ours()),
    Contender("DTensors", True, _ours()),
    Contender("torch foreach", True, _torch(foreach=True)),
    Contender("torch for-loop", True, _torch(foreach=False)),
    Contender("average: plain tensors", False, _ours(ema_decay=0.999)),
    Contender("average: DTensors", True, _ours(ema_decay=0.999)),
    Contender("bf16 momentum: plain tensors", False, _ours(momentum_dtype="bfloat16")),
    Contender("bf16 momentum: DTensors", True, _ours(momentum_dtype="bfloat16")),
    Contender("clip and step: plain tensors", False, _ours(), _clip),
    Contender("clip and step: DTensors", True, _ours(), _clip),
    Contender("clip and step: torch foreach", True, _torch(foreach=True), _clip_by_torch),
]


def new_gradients(params: list[Tensor]) -> None:
    for param in params:
        shard = torch.full((ELEMENTS,), 1e-3)
        param.grad = DTensor(shard, param._spec, requires_grad=False) if isinstance(param, DTensor) else shard


def measure(contender: Contender, count: int, mesh: Any, is_new: bool) -> list[float]:
    """Seconds of each step."""
    shards = [torch.randn(ELEMENTS) for _ in range(count)]
    values = [DTensor.from_local(shard, mesh, [Shard(0)]) for shard in shards] if contender.distributed else shards
    params: list[Tensor] = [torch.nn.Parameter(value) for value in values]
    optimizer = contender.make(params)

    def step() -> float:
        begin = time.perf_counter()
        if contender.clip is not None:
            contender.clip(optimizer)
        optimizer.step()
        return time.perf_counter() - begin

    new_gradients(params)
    for _ in range(3):
        step()
    times: list[float] = []
    # All ranks must clip as often: the number of rounds is rank 0's.
    rounds = torch.tensor([min(max(SECONDS / step(), MIN_ROUNDS), MAX_ROUNDS)], dtype=torch.float64)
    torch.distributed.broadcast(rounds, 0)
    for _ in range(int(rounds)):
        if is_new:
            new_gradients(params)
        times.append(step())
    return times


def run_rank(rank: int, ranks: int, port: int, counts: Sequence[int], results: Any) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, ranks, rank == 0
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    gc.disable()
    work = [(count, contender, is_new) for count in counts for contender in CONTENDERS for is_new in (False, True)]
    for count, contender, is_new in tqdm(work, desc=f"{ranks} rank(s)", disable=rank != 0, leave=False):
        median = torch.tensor([statistics.median(measure(contender, count, mesh, is_new))], dtype=torch.float64)
        torch.distributed.all_reduce(median, torch.distributed.ReduceOp.MAX)
        if rank == 0:
            results.append({
                "ranks": ranks, "contender": contender.label, "count": count,
                "new_gradients": is_new, "ns_per_tensor": median.item() / count * 1e9,
            })  # fmt: skip
        gc.collect()
    torch.distributed.destroy_process_group()


def table(results: list[dict[str, Any]], ranks: int, counts: Sequence[int]) -> str:
    """Rows of contenders, columns of numbers of tensors, with the same gradients and with new ones."""
    found = {
        (r["contender"], r["count"], r["new_gradients"]): r["ns_per_tensor"] for r in results if r["ranks"] == ranks
    }
    header = ["ns a tensor", *(f"{count:,}{' new' * is_new}" for count in counts for is_new in (False, True))]
    rows = [
        [each.label, *(f"{found[each.label, count, is_new]:,.0f}" for count in counts for is_new in (False, True))]
        for each in CONTENDERS
    ]
    return f"{ranks} rank{'s' * (ranks > 1)}\n{aligned(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--tensors", type=int, nargs="+", default=[100, 300, 1000], help="(default: 100 300 1000)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    environment = describe()
    print("\n".join(f"{key:<30}{value}" for key, value in environment.items()), "\n")
    all_results: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with socket.socket() as free, torch.multiprocessing.get_context("spawn").Manager() as manager:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            results = manager.list()
            torch.multiprocessing.spawn(run_rank, (ranks, port, options.tensors, results), nprocs=ranks)  # type: ignore[attr-defined]
            all_results += list(results)
        print(table(all_results, ranks, options.tensors), "\n")
        if options.json is not None:
            options.json.write_text(json.dumps({"environment": environment, "results": all_results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
