"""Checkpoints of FSDP2 models: bytes on disk, and seconds to save and to load, beside torch.optim.SGD.

    python benchmarks/bench_checkpoints.py                          # on one rank and on two
    python benchmarks/bench_checkpoints.py --folder /dev/shm        # without a disk's moods

Model and optimizer are saved together, by torch.distributed.checkpoint (DCP) and by torch.save of the whole state dict
on rank 0, and loaded into a model that has state already. Contenders take turns, on one thread for each rank. Medians
over the rounds, of the slower rank; ratios are medians over rounds, to SGD's time of the same round.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import describe
from tables import aligned
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from momentum_ext import FusedMomentum

HYPER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Contender:
    label: str
    optimizer: type[torch.optim.Optimizer] = FusedMomentum
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


CONTENDERS = [
    Contender("torch.optim.SGD", torch.optim.SGD),
    Contender("FusedMomentum"),
    Contender("master_weights, bf16 parameters", dtype=torch.bfloat16, options={"master_weights": True}),
    Contender("int8 momentum", options={"momentum_dtype": "int8"}),
    Contender(
        "int8 momentum, compact_state_dict=False", options={"momentum_dtype": "int8", "compact_state_dict": False}
    ),
]


class Training:
    """A contender's model and optimizer, after two steps."""

    def __init__(self, contender: Contender, mesh: DeviceMesh, layers: int, width: int):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(contender.dtype)
        for layer in (*self.model, self.model):
            fully_shard(layer, mesh=mesh)
        self.count = sum(param.numel() for param in self.model.parameters())
        self.optimizer = contender.optimizer(self.model.parameters(), **HYPER, **contender.options)
        for _ in range(2):
            for param in self.model.parameters():
                param.grad = torch.full_like(param, 1e-3)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, options: StateDictOptions | None = None) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def set(self, state: dict[str, Any], options: StateDictOptions | None = None) -> None:
        # One after the other: set_state_dict() takes a rank's empty dict for no model, and others would wait for it.
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)

    def save_by_dcp(self, folder: Path) -> None:
        save(self.state(), checkpoint_id=folder)

    def load_by_dcp(self, folder: Path) -> None:
        state = self.state()
        load(state, checkpoint_id=folder)
        self.set(state)

    def save_by_torch(self, folder: Path) -> None:
        state = self.state(StateDictOptions(full_state_dict=True, cpu_offload=True))
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / "checkpoint.pt")

    def load_by_torch(self, folder: Path) -> None:
        state: dict[str, Any] = {"model": {}, "optimizer": {}}
        if torch.distributed.get_rank() == 0:
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
        self.set(state, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


ACTIONS = ["save_by_dcp", "load_by_dcp", "save_by_torch", "load_by_torch"]


def seconds(action: Callable[[Path], None], folder: Path) -> float:
    torch.distributed.barrier()
    begin = time.perf_counter()
    action(folder)
    return time.perf_counter() - begin


def measure(mesh: DeviceMesh, folder: Path, options: argparse.Namespace) -> tuple[torch.Tensor, list[list[float]]]:
    """Seconds [rounds, contenders, actions], of the slower rank; bytes for each parameter, by DCP and by torch.save."""
    trainings = [Training(contender, mesh, options.layers, options.width) for contender in CONTENDERS]
    times = torch.zeros(options.rounds + 1, len(CONTENDERS), len(ACTIONS), dtype=torch.float64)
    sizes = [[0.0, 0.0] for _ in CONTENDERS]
    for k in tqdm(range(options.rounds + 1), disable=mesh.get_rank() != 0, leave=False):
        for c, training in enumerate(trainings):
            folders = [folder / str(i) for i in range(2)]
            for each in folders:
                each.mkdir(exist_ok=True)
            for a, action in enumerate(ACTIONS):
                times[k, c, a] = seconds(getattr(training, action), folders[a // 2])
            torch.distributed.barrier()
            sizes[c] = [sum(file.stat().st_size for file in each.iterdir()) / training.count for each in folders]
            torch.distributed.barrier()
            if mesh.get_rank() == 0:
                for each in folders:
                    shutil.rmtree(each)
            torch.distributed.barrier()
            gc.collect()
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    return times[1:], sizes  # the first round warms up


def run_rank(rank: int, port: int, folder: Path, ranks: int, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, ranks, rank == 0
    )
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    times, sizes = measure(init_device_mesh("cpu", (ranks,)), folder, options)
    if rank == 0:
        results["found"] = times.tolist(), sizes
    torch.distributed.destroy_process_group()


def tables(times: torch.Tensor, sizes: list[list[float]], ranks: int) -> str:
    """A table for each way to save: rows of contenders, bytes a parameter, times, and how many times SGD's they are."""
    medians, ratios = times.quantile(0.5, dim=0), (times / times[:, :1]).quantile(0.5, dim=0)
    found = []
    for number, way in enumerate(("DCP", "torch.save")):
        header = [f"{way}, {ranks} rank{'s' * (ranks > 1)}", "bytes", "save ms", "x SGD", "load ms", "x SGD"]
        rows = []
        for c, contender in enumerate(CONTENDERS):
            row = [contender.label, f"{sizes[c][number]:.2f}"]
            for a in (2 * number, 2 * number + 1):
                row += [f"{medians[c, a] * 1e3:,.0f}", f"{ratios[c, a]:.2f}"]
            rows.append(row)
        found.append(aligned(header, rows))
    return "\n\n".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--layers", type=int, default=12, help="of the model (default: 12)")
    parser.add_argument("--width", type=int, default=1024, help="of each layer (default: 1024)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the system's for such)")
    options = parser.parse_args(arguments)
    print("\n".join(f"{key:<30}{value}" for key, value in describe().items()), "\n")
    print(f"{options.layers} linear layers of {options.width} x {options.width} and their biases; bytes a parameter\n")
    for ranks in options.ranks:
        with (
            socket.socket() as free,
            torch.multiprocessing.get_context("spawn").Manager() as manager,
            tempfile.TemporaryDirectory(dir=options.folder) as folder,
        ):
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            results = manager.dict()
            torch.multiprocessing.spawn(  # type: ignore[attr-defined]
                run_rank, (port, Path(folder), ranks, options, results), nprocs=ranks
            )
            times, sizes = results["found"]
            print(tables(torch.tensor(times), sizes, ranks), "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
