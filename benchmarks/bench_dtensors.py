"""What a step costs the host when parameters are DTensors: beside the same shards as plain tensors, and torch's steps.

    python benchmarks/bench_dtensors.py                    # on one rank and on two
    python benchmarks/bench_dtensors.py --ranks 2 --tensors 1000

Contenders take turns, on one thread for each rank, with shards of 16 elements. A turn is a step off the clock, which
finds the tensors for the caches, and one on it; "new" gives every parameter a new gradient between the two, as FSDP2
does. Ranks begin a step together. Medians over the rounds, of the slower rank.
"""

from __future__ import annotations

import argparse
import gc
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from environment import describe
from tables import aligned
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm

from momentum_ext import FusedMomentum

ELEMENTS = 16  # of each rank's shard
HYPER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
ROUNDS = 25


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
    Contender("int8 momentum: plain tensors", False, _ours(momentum_dtype="int8")),
    Contender("int8 momentum: DTensors", True, _ours(momentum_dtype="int8")),
    Contender("clip and step: plain tensors", False, _ours(), _clip),
    Contender("clip and step: DTensors", True, _ours(), _clip),
    Contender("clip and step: torch foreach", True, _torch(foreach=True), _clip_by_torch),
]


def new_gradients(params: list[Tensor]) -> None:
    for param in params:
        shard = torch.full((ELEMENTS,), 1e-3)
        param.grad = DTensor(shard, param._spec, requires_grad=False) if isinstance(param, DTensor) else shard


class Turn:
    """One contender with its own tensors."""

    def __init__(self, contender: Contender, count: int, mesh: DeviceMesh, is_new: bool):
        shards = [torch.randn(ELEMENTS) for _ in range(count)]
        values = [DTensor.from_local(shard, mesh, [Shard(0)]) for shard in shards] if contender.distributed else shards
        self.params: list[Tensor] = [torch.nn.Parameter(value) for value in values]
        self.optimizer = contender.make(self.params)
        self.clip = contender.clip
        self.is_new = is_new
        new_gradients(self.params)

    def step(self) -> None:
        if self.clip is not None:
            self.clip(self.optimizer)
        self.optimizer.step()

    def time(self) -> float:
        """Seconds of a step, after another that finds its tensors for the caches."""
        self.step()
        if self.is_new:
            new_gradients(self.params)
        torch.distributed.barrier()  # else a collective would wait for a rank that is late
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin


def measure(count: int, mesh: DeviceMesh, is_new: bool, hidden: bool) -> list[float]:
    """The median of the slower rank for each contender, in seconds."""
    turns = [Turn(contender, count, mesh, is_new) for contender in CONTENDERS]
    for turn in turns:
        turn.time()
    label = f"{mesh.size()} rank{'s' * (mesh.size() > 1)}, {count:,} tensors{', new gradients' * is_new}"
    rounds = tqdm(range(ROUNDS), desc=label, disable=hidden, leave=False)
    times = torch.tensor([[turn.time() for turn in turns] for _ in rounds], dtype=torch.float64)
    medians = times.quantile(0.5, dim=0)
    torch.distributed.all_reduce(medians, torch.distributed.ReduceOp.MAX)
    return medians.tolist()


def run_rank(rank: int, ranks: int, port: int, counts: Sequence[int], results: Any) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, ranks, rank == 0
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    gc.disable()
    for count in counts:
        for is_new in (False, True):
            medians = measure(count, mesh, is_new, hidden=rank != 0)
            if rank == 0:
                results[count, is_new] = [median / count * 1e9 for median in medians]
            gc.collect()
    torch.distributed.destroy_process_group()


def table(found: dict[tuple[int, bool], list[float]], ranks: int) -> str:
    """Rows of contenders, columns of numbers of tensors, with the same gradients and with new ones."""
    header = ["ns a tensor", *(f"{count:,}{' new' * is_new}" for count, is_new in found)]
    rows = [
        [each.label, *(f"{nanoseconds[i]:,.0f}" for nanoseconds in found.values())] for i, each in enumerate(CONTENDERS)
    ]
    return f"{ranks} rank{'s' * (ranks > 1)}\n{aligned(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--tensors", type=int, nargs="+", default=[100, 300, 1000], help="(default: 100 300 1000)")
    options = parser.parse_args(arguments)
    print("\n".join(f"{key:<30}{value}" for key, value in describe().items()), "\n")
    for ranks in options.ranks:
        with socket.socket() as free, torch.multiprocessing.get_context("spawn").Manager() as manager:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            results = manager.dict()
            torch.multiprocessing.spawn(run_rank, (ranks, port, options.tensors, results), nprocs=ranks)  # type: ignore[attr-defined]
            print(table(dict(results), ranks), "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
