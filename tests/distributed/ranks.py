"""Processes that are the ranks of one gloo group and run a test's functions side by side."""

import datetime
import functools
import multiprocessing
import socket
import traceback

import torch

WAIT = 60  # seconds for a collective that not all ranks have called


class Ranks:
    """`size` processes that live as long as this object."""

    def __init__(self, size):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, function, *arguments):
        """What `function(*arguments)`, of a module's top level, returns on each rank.

        Raises AssertionError with the errors of all ranks where one has raised.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _serve(pipe, rank, size, port):
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0)
    wait = datetime.timedelta(seconds=WAIT)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


@functools.cache
def mesh_of(*shape, names=None):
    """A mesh over all ranks, made once in a process."""
    return torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
