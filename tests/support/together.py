"""Processes that train together, forked from this one, which has its imports done."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState


def together(function: Callable[[], int], *, processes: int = 2) -> list[int]:
    """The statuses of `function` in each of the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in about.items()}, MASTER_ADDR="localhost")
        os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate would choose, and sums be rounded in another way
        AcceleratorState._reset_state(reset_partial_state=True)
        status = function()
        torch.distributed.destroy_process_group()
        os._exit(status)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    return [worker.exitcode for worker in workers]
