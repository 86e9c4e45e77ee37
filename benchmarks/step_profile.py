"""Where the time of a training step goes, by kind of operation: torch's profiler on a stage's own steps.

    OMP_NUM_THREADS=1 python -m benchmarks.step_profile                 # the embedded profile's first stage
    OMP_NUM_THREADS=1 python -m benchmarks.step_profile policy=smolvla  # any of its settings

The stage is an ordinary one, recorded and cached where that is missing, and ends after the steps that are measured; its
run folder is removed. CPU time and page faults are of steps without the profiler, which itself costs some of a step.
"""

import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kuavo_train.command_line import errors_in_one_line, quieten_libraries
from kuavo_train.errors import require

RUN = "step-profile"
WORDS = ("learn=[moving_grasp]", "rollout.episodes=0")
WARM, STEPS = 30, 30  # steps that do not count, and that are timed, then profiled
KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "joining, copying and filling": ("aten::cat", "aten::copy_", "aten::fill_", "aten::index", "aten::_index"),
}
REST = "all else: norms, gates, rotations, views, and autograd's own"


class Measured(Exception):
    """Enough steps were seen."""


class Watch:
    """Of the steps of a stage, by their number."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.began = self.now()
        self.ms = self.faults = 0.0

    @staticmethod
    def now() -> tuple[float, int]:
        return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def before(self, step: int) -> None:
        if step == WARM:
            self.began = self.now()
        elif step == WARM + STEPS:
            seconds, faults = (now - then for now, then in zip(self.now(), self.began, strict=True))
            self.ms, self.faults = 1e3 * seconds / STEPS, faults / STEPS
            self.profile.start()
        elif step == WARM + 2 * STEPS:
            self.profile.stop()
            raise Measured

    def shares(self) -> dict[str, float]:
        """Kind of operation → its share of the profiled time."""
        found: defaultdict[str, float] = defaultdict(float)
        for event in self.profile.key_averages():
            kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), REST)
            found[kind] += event.self_cpu_time_total
        whole = sum(found.values())
        return {kind: found[kind] / whole for kind in (*KINDS, REST)}


@contextmanager
def watched() -> Iterator[Watch]:
    """The watch sees every call of `Learner.learn`."""
    from kuavo_train.training.learner import Learner

    watch, learn, steps = Watch(), Learner.learn, iter(range(sys.maxsize))

    def watching(self: Learner, *arguments: Any, **more: Any) -> dict[str, float]:
        watch.before(next(steps))
        return learn(self, *arguments, **more)

    Learner.learn = watching  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Learner.learn = learn  # type: ignore[method-assign]


def main(words: Sequence[str]) -> int:
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    quieten_libraries()
    return errors_in_one_line(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    from kuavo_train.compose import compose_run, stages_to_run
    from kuavo_train.stage.stage import run_stage

    configs = compose_run([*WORDS, *words, f"run={RUN}"])
    first = stages_to_run(configs)[0]
    shutil.rmtree(first.run_folder, ignore_errors=True)
    try:
        with watched() as watch, suppress(Measured):
            run_stage(first, [config.stage for config in configs])
    finally:
        shutil.rmtree(first.run_folder, ignore_errors=True)
    require(watch.ms > 0, "training.max_steps", f"be at least {WARM + 2 * STEPS}", "fewer")
    print(table(watch))
    return 0


def table(watch: Watch) -> str:
    lines = [f"{watch.ms:.1f} ms of CPU and {watch.faults:.0f} page faults a step, without the profiler", ""]
    lines += ["| kind of operation | share of a profiled step |", "|---|---|"]
    lines += [f"| {kind} | {share:.0%} |" for kind, share in watch.shares().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
