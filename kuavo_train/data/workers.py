"""The loader's workers: what they need of shared memory, and deaths that nobody has to wait for.

A worker puts its batches into shared memory (/dev/shm), of which a container has 64 MiB by default. Where
one does not fit, torch's worker prints a traceback and goes on, and the trainer waits for the batch for ever.
"""

import multiprocessing.queues
import os
import sys
from types import TracebackType

from kuavo_sim.children import follow_parent
from kuavo_train.data.images.plan import GIB, size_text

PREFETCHED = 2  # batches that each worker has ready or under way
SHARED_MEMORY = "/dev/shm"


def free_shared_memory() -> int | None:
    """Bytes; None where there is no such thing."""
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return about.f_bavail * about.f_frsize


def room_problems(num_workers: int, batch_bytes: int, *, batches_per_step: int, processes: int = 1) -> list[str]:
    """Why the batches under way do not fit.

    Args:
        batch_bytes: of one batch.
        batches_per_step: the trainer holds those of one step while it fetches those of the next.
        processes: that train on this machine, each with workers of its own.
    """
    batches = processes * (num_workers * PREFETCHED + 2 * batches_per_step)
    needed, free = batches * batch_bytes, free_shared_memory()
    if num_workers == 0 or free is None or needed <= free:
        return []
    return [
        f"data.num_workers={num_workers} needs {size_text(needed)} of shared memory, {batches} batches of "
        f"{size_text(batch_bytes)}, {SHARED_MEMORY} has {size_text(free)} free; set data.num_workers=0, or give the "
        f"container more (docker run --shm-size={needed // GIB + 1}g)"
    ]


def begin_as_worker(_worker: int) -> None:
    """In a worker: a batch that it cannot hand over is its death, for it would never come.

    The thread that hands batches over has nothing to say of a trainer that has gone: the trainer said why itself.
    """
    follow_parent()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_die_of)  # type: ignore[attr-defined]
    sys.excepthook = _report_unless_trainer_is_gone


def _die_of(error: Exception, _batch: object) -> None:
    print(f"a loader worker cannot hand over a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _report_unless_trainer_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def loss_of_worker(text: str) -> str | None:
    """What torch says when a worker has died, with what to do; None for anything else it says."""
    if not text.startswith(("DataLoader worker (pid", "Too many open files")):
        return None
    free = free_shared_memory()
    room = "" if free is None else f"; {SHARED_MEMORY} has {size_text(free)} free"
    return (
        f"the data loader has lost a worker: {text.rstrip('. ')}{room}; read without workers (data.num_workers=0), or "
        "give a container more shared memory (docker run --shm-size=8g)"
    )
