"""Processes that are the ranks of one group and run a test's functions side by side."""

import datetime
import functools
import multiprocessing
import socket
import traceback

import torch

WAIT = 60  # seconds for a collective that not all ranks have called


class Ranks:
    """`size` processes that live as long as this object, or until one of them raises: the next run has new ones.

    Their tensors are made on the device, which all of them share.
    """

    def __init__(self, size, backend="gloo", device="cpu"):
        self._size, self._backend, self._device = size, backend, device
        self._pipes, self._processes = [], []

    def _start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self._size):
            pipe, theirs = context.Pipe()
            arguments = (theirs, rank, self._size, port, self._backend, self._device)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, function, *arguments):
        """What `function(*arguments)`, of a module's top level, returns on each rank.

        Raises AssertionError with the errors of all ranks where one has raised.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [_answer(pipe) for pipe in self._pipes]
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if errors:  # a collective may not have been called by all
            for process in self._processes:
                process.kill()
            self._pipes, self._processes = [], []
        assert not errors, "\n".join(errors)
        return [result for result, _ in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return None, "the process has ended"


def _serve(pipe, rank, size, port, backend, device):
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(0)
        torch.set_default_device(device)
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0)
    wait = datetime.timedelta(seconds=WAIT)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
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
    kind = torch.get_default_device().type
    return torch.distributed.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=names)
