"""How many processes are worth starting."""

import os


def usable_cpus() -> int:
    """CPUs this process may use, which a container or `taskset` may have limited; at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
