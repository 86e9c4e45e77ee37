"""The loop: batch → loss → step. Knows no task names and no files.

The randomness of step n (noise, time, dropout) is a pure function of (seed, stage, n), and so is the order of samples,
given the changes on record of shares and of samples per batch; several processes share both out (company.py). A resumed
run therefore needs weights, optimizer, scheduler, the step and those changes, and continues bit-identically; what
validation draws cannot touch it.

How tasks are learnt one after another without losing the earlier ones is decided elsewhere: by the order (which
samples), by an extra loss, and by what a validation decides.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, final

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from kuavo_train.data.batch import Batch
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.sampler import Order, StepSampler
from kuavo_train.errors import Interrupted
from kuavo_train.reading import Json
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.freed_memory import keep_freed_memory
from kuavo_train.training.learner import Learner, TrainingDiverged
from kuavo_train.training.step_metrics import STEP_PARTS, MetricsWindow


@dataclass(frozen=True)
class Decision:
    """What follows from a validation.

    Attributes:
        loss: mean held-out loss over all tasks seen.
        stop: why the stage must end here.
        shares: task → share of the samples from the next step on.
    """

    loss: float
    stop: str | None = None
    shares: dict[str, float] | None = None


@final
class SharesChange(TypedDict):
    """Of task → share of the samples, from a step on."""

    step: int
    shares: dict[str, float]


@final
class SizeChange(TypedDict):
    """Of the samples of a batch of all processes together, from a step on."""

    step: int
    samples: int


class TrainerHooks:
    """What is done between steps. Each does nothing unless it is overridden."""

    def report(self, values: Json, step: int) -> None:
        """Metrics, every `log_every` steps and at the end."""

    def epoch_done(self, step: int, epoch: int) -> Decision:
        """Measure the policy on held-out data, every `validate_every` epochs and at the end."""
        return Decision(loss=math.inf)

    def save(self, progress: "Progress") -> None:
        """Write a checkpoint."""

    def stop_signal(self) -> int | None:
        """The number of a signal, once one has arrived."""
        return None


@dataclass(frozen=True)
class Limits:
    """When a stage ends, and what is done how often until then.

    Attributes:
        validate_every: epochs. log_every, save_every: steps.
        result: which of the validated checkpoints the stage ends in: best (least loss), last.
    """

    timetable: Timetable
    validate_every: int
    log_every: int
    save_every: int
    result: str = "best"


@dataclass
class Batches:
    """The samples of a stage, by optimizer step.

    Attributes:
        current: the task that epochs are counted in.
        per_step: batches that are accumulated for an optimizer step.
    """

    dataset: MixedDataset
    order: Order
    current: str
    per_step: int = 1
    num_workers: int = 0

    def of_steps(self, start: int, stop: int, *, process: int, pin_memory: bool) -> Iterator[list[Batch]]:
        """The batches of a process, step by step."""
        sampler = StepSampler(self.order, start=start, stop=stop, batches_per_step=self.per_step, process=process)
        batches = self.dataset.batches(sampler, num_workers=self.num_workers, pin_memory=pin_memory)
        for _ in range(start, stop):
            yield [next(batches) for _ in range(self.per_step)]

    def change(self, change: SharesChange | SizeChange, timetable: Timetable) -> None:
        """Deal by other shares or in other batches from a step on, in epochs as long as that makes them.

        Args:
            change: one of `Progress.changes`.
        """
        batch = change["step"] * self.per_step
        if "shares" in change:
            self.order.change_shares(change["shares"], batch=batch)
        else:
            self.order.change_samples(change["samples"], batch=batch)
        timetable.change(change["step"], self.order.steps_per_epoch(self.current, self.per_step))


@dataclass
class Progress:
    """Where a stage stands; everything a resume needs beside weights, optimizer and scheduler.

    Attributes:
        drawn: place of a task in the mixture → frames drawn; one dictionary until the shares change, then another.
        not_kept: place of a task → frames drawn that are not among those kept of it for replay.
        raises: the changes of shares so far. sizes: those of samples.
        best_step, best_loss: of the checkpoint the stage would end in now, and its loss.
        stopped: why the stage ended before its last step.
        unreported: what was measured in the steps since the last report.
        validation_due: whether the validation of `step` was given up, and comes first when the stage goes on.
    """

    step: int = 0
    drawn: list[dict[int, int]] = field(default_factory=lambda: [{}])
    drawn_episodes: dict[int, list[int]] = field(default_factory=dict)
    not_kept: dict[int, int] = field(default_factory=dict)
    raises: list[SharesChange] = field(default_factory=list)
    sizes: list[SizeChange] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    stopped: str | None = None
    validation_due: bool = False
    unreported: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, batch: Batch, not_kept: Mapping[int, int]) -> None:
        """Add the samples of a batch that was really drawn, and those of them that are not kept for replay."""
        places, drawn = batch.origin.task, self.drawn[-1]
        for place in places.unique().tolist():
            mine = places == place
            drawn[place] = drawn.get(place, 0) + int(mine.sum())
            episodes = set(self.drawn_episodes.get(place, [])) | set(batch.origin.episode[mine].tolist())
            self.drawn_episodes[place] = sorted(episodes)
        self.not_kept = dict(Counter(self.not_kept) + Counter(not_kept))

    def joined(self, others: Sequence["Progress"]) -> "Progress":
        """With what other processes have drawn."""
        everyone = (self, *others)
        drawn = [
            dict(sum(map(Counter, each), Counter[int]())) for each in zip(*(p.drawn for p in everyone), strict=True)
        ]
        episodes: dict[int, list[int]] = {}
        for place, found in (item for progress in everyone for item in progress.drawn_episodes.items()):
            episodes[place] = sorted({*episodes.get(place, []), *found})
        not_kept = dict(sum((Counter(progress.not_kept) for progress in everyone), Counter[int]()))
        return replace(self, drawn=drawn, drawn_episodes=episodes, not_kept=not_kept)

    def changes(self, samples: int) -> list[SharesChange | SizeChange]:
        """All of raises and sizes in their order, once a batch has so many `samples` from now on."""
        if not self.sizes or self.sizes[-1]["samples"] != samples:
            self.sizes.append({"step": self.step, "samples": samples})
        return sorted([*self.sizes, *self.raises], key=lambda change: change["step"])

    def total_drawn(self) -> dict[int, int]:
        """Place of a task → frames drawn so far."""
        return dict(sum((Counter(drawn) for drawn in self.drawn), Counter()))


@dataclass
class Trainer:
    """One stage's optimization."""

    learner: Learner
    batches: Batches
    limits: Limits
    hooks: TrainerHooks
    description: str = "train"

    def run(self, progress: Progress) -> Progress:
        """Train from `progress.step` to the end, or to where a validation stops it.

        Raises:
            Interrupted: a signal arrived; a checkpoint of the current step is written first. A validation is given up
                for it and made up for on resuming.
            TrainingDiverged: loss or gradient not finite; the weights of that step are not saved.
        """
        keep_freed_memory()
        self.learner.policy.train()
        window = MetricsWindow(progress.unreported)
        with tqdm(
            total=self.limits.timetable.steps,
            initial=progress.step,
            desc=self.description,
            unit="step",
            disable=not self.learner.accelerator.is_main_process,
        ) as bar:
            if progress.validation_due:
                self._validate_and_save(progress)
            for batches in self._steps(progress):
                window.start_step()
                values = self._learn(progress.step, batches, window)
                progress.step += 1
                for batch in batches:
                    progress.count(batch, self.batches.order.not_kept(batch.origin))
                samples = self.learner.accelerator.num_processes * sum(batch.size for batch in batches)
                progress.seconds += window.end_step(values, samples)
                bar.update()
                if progress.step % self.limits.log_every == 0 or progress.step == self.limits.timetable.steps:
                    self._report(progress, window, bar)
                    progress.unreported = {}
                    window = MetricsWindow(progress.unreported)
                self._validate_and_save(progress)
                bar.total = self.limits.timetable.steps
                window.go_on()
                signal_number = self.hooks.stop_signal()
                if signal_number is not None:
                    self.hooks.save(progress)
                    raise Interrupted(signal_number)
        return progress

    def _steps(self, progress: Progress) -> Iterator[list[Batch]]:
        """The batches of every step to come. Once shares change the loader starts anew: it fetches ahead."""
        accelerator, timetable = self.learner.accelerator, self.limits.timetable
        while progress.step < timetable.steps and progress.stopped is None:
            raises = len(progress.raises)
            pin_memory = accelerator.device.type == "cuda"
            for batches in self.batches.of_steps(
                progress.step, timetable.steps, process=accelerator.process_index, pin_memory=pin_memory
            ):
                yield batches
                if progress.stopped is not None or len(progress.raises) > raises:
                    break

    def _learn(self, step: int, batches: list[Batch], window: MetricsWindow) -> dict[str, float]:
        order = self.batches.order
        seed = step_seed(order.seed, order.stage, step, 0)
        try:
            return self.learner.learn(batches, step=step, seed=seed, window=window)
        except TrainingDiverged as found:  # in all processes, which know each other's loss and gradient
            raise TrainingDiverged(
                f"{found} at step {step + 1} must be finite; its samples (task, episode, frame): {self._named(batches)}"
            ) from None

    def _named(self, batches: list[Batch], most: int = 8) -> str:
        names = gather_object(
            [
                f"({self.batches.order.tasks[task].name}, {episode}, {frame})"
                for batch in batches
                for task, episode, frame, _ in zip(*(of_all.tolist() for of_all in batch.origin), strict=True)
            ]
        )
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    def _report(self, progress: Progress, window: MetricsWindow, bar: tqdm) -> None:
        drawn = sum((Counter(each) for each in gather_object([progress.total_drawn()])), Counter())
        values = {
            "epoch": self.limits.timetable.epoch(progress.step),
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            **window.summary(),
            "seconds": round(progress.seconds, 3),
            "task_frames": {self.batches.order.tasks[place].name: n for place, n in sorted(drawn.items())},
        }
        self.hooks.report(values, progress.step)
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.1e}, {values['samples_per_s']:.0f} samples/s; ms "
            + ", ".join(f"{part} {values[f'{part}_ms']:.0f}" for part in STEP_PARTS),
            refresh=False,
        )

    def _validate_and_save(self, progress: Progress) -> None:
        if self.limits.timetable.validates(progress.step, every=self.limits.validate_every):
            progress.validation_due = True
            try:
                self._validate(progress)
            except Interrupted:
                self.hooks.save(progress)
                raise
            progress.validation_due = False
            self.hooks.save(progress)
        elif progress.step % self.limits.save_every == 0:
            self.hooks.save(progress)

    def _validate(self, progress: Progress) -> None:
        step = progress.step
        found = self.hooks.epoch_done(step, self.limits.timetable.number(step))
        self.learner.policy.train()
        if self.limits.result == "last" or found.loss < progress.best_loss:
            progress.best_loss, progress.best_step = found.loss, step
        progress.stopped = found.stop
        if found.shares is not None:
            progress.raises.append({"step": step, "shares": found.shares})
            progress.drawn.append({})
            self.batches.change(progress.raises[-1], self.limits.timetable)


def step_seed(*key: int) -> int:
    """A 63-bit seed from integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
