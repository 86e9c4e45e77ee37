"""The loop: batch → loss → step. Knows no task names and no files.

The randomness of step n (noise, time, dropout) is a pure function of (seed, stage, n, process), and so is the
order of samples, given the changes on record of shares and of samples per batch. A resumed run therefore needs weights,
optimizer, scheduler, the step and those changes, and continues bit-identically; what validation draws cannot touch it.

How tasks are learnt one after another without losing the earlier ones is decided elsewhere: by the order (which
samples), by an extra loss, and by what a validation asks for.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from kuavo_train.config import TrainingConfig
from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images.augmentation import Augmentation, no_augmentation
from kuavo_train.data.sampler import Order, StepSampler
from kuavo_train.errors import Interrupted, RunError
from kuavo_train.training.carried_memory import Recurrence
from kuavo_train.training.ema import Average
from kuavo_train.training.epochs import Timetable
from kuavo_train.training.extra_loss import ExtraLoss
from kuavo_train.training.step_metrics import STEP_PARTS, MetricsWindow


class TrainingDiverged(RunError):
    """The loss or the gradient is no longer finite; names the step and the samples."""


@dataclass(frozen=True)
class Validated:
    """What a validation found, and what it asks for.

    Attributes:
        loss: mean held-out loss over all tasks seen.
        stop: why the stage must end here.
        shares: task → share of the samples from the next step on.
    """

    loss: float
    stop: str | None = None
    shares: dict[str, float] | None = None


@dataclass
class Progress:
    """Where a stage stands; everything a resume needs beside weights, optimizer and scheduler.

    Attributes:
        drawn: place of a task in the mixture → frames drawn; one dictionary until the shares change, then another.
        raises: the changes of shares so far, as {"step", "shares"}.
        sizes: samples of a batch of all processes together, from a step on, as {"step", "samples"}.
        best_step, best_loss: of the checkpoint the stage would end in now, and its loss.
        stopped: why the stage ended before its last step.
        unreported: what was measured in the steps since the last report.
        validation_due: whether the validation of `step` was given up, and comes first when the stage goes on.
    """

    step: int = 0
    drawn: list[dict[int, int]] = field(default_factory=lambda: [{}])
    drawn_episodes: dict[int, list[int]] = field(default_factory=dict)
    raises: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    stopped: str | None = None
    validation_due: bool = False
    unreported: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, batch: Batch) -> None:
        """Add the samples of a batch that was really drawn."""
        places, drawn = batch["task_position"], self.drawn[-1]
        for place in places.unique().tolist():
            mine = places == place
            drawn[place] = drawn.get(place, 0) + int(mine.sum())
            episodes = set(self.drawn_episodes.get(place, [])) | set(batch["episode_index"][mine].tolist())
            self.drawn_episodes[place] = sorted(episodes)

    def joined(self, others: Sequence["Progress"]) -> "Progress":
        """With what other processes have drawn."""
        everyone = (self, *others)
        drawn = [
            dict(sum(map(Counter, each), Counter[int]())) for each in zip(*(p.drawn for p in everyone), strict=True)
        ]
        episodes: dict[int, list[int]] = {}
        for place, found in (item for progress in everyone for item in progress.drawn_episodes.items()):
            episodes[place] = sorted({*episodes.get(place, []), *found})
        return replace(self, drawn=drawn, drawn_episodes=episodes)

    def changes(self, samples: int) -> list[dict[str, Any]]:
        """All of raises and sizes in their order, once a batch has so many `samples` from now on."""
        if not self.sizes or self.sizes[-1]["samples"] != samples:
            self.sizes.append({"step": self.step, "samples": samples})
        return sorted([*self.sizes, *self.raises], key=lambda change: change["step"])

    def total_drawn(self) -> dict[int, int]:
        """Place of a task → frames drawn so far."""
        return dict(sum((Counter(drawn) for drawn in self.drawn), Counter()))


def deal_by(
    change: Mapping[str, Any], order: Order, timetable: Timetable, *, current: str, batches_per_step: int
) -> None:
    """Deal by other shares or in other batches from a step on, in epochs as long as that makes them.

    Args:
        change: one of `Progress.changes`.
        current: the task that epochs are counted in.
    """
    batch = change["step"] * batches_per_step
    if "shares" in change:
        order.change_shares(change["shares"], batch=batch)
    else:
        order.change_samples(change["samples"], batch=batch)
    timetable.change(change["step"], order.steps_per_epoch(current, batches_per_step))


@dataclass
class Trainer:
    """One stage's optimization.

    `log(values, step)` receives metrics; `validate(step, epoch)` measures the policy on held-out data; `save(progress)`
    writes a checkpoint; `stop_signal()` returns a signal number once one has arrived.
    """

    accelerator: Accelerator
    policy: Any
    preprocessor: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dataset: MixedDataset
    order: Order
    recurrence: Recurrence
    extra_loss: ExtraLoss
    average: Average
    config: TrainingConfig
    timetable: Timetable
    current: str  # the task that epochs are counted in
    validate_every: int  # epochs
    result: str  # of the checkpoints validated, what the stage ends in: best, last
    num_workers: int
    log: Callable[[dict[str, Any], int], None]
    validate: Callable[[int, int], Validated]
    save: Callable[[Progress], None]
    stop_signal: Callable[[], int | None]
    description: str = "train"
    augment: Augmentation = no_augmentation

    def run(self, progress: Progress) -> Progress:
        """Train from `progress.step` to the end, or to where a validation asks to stop.

        Raises:
            Interrupted: a signal arrived; a checkpoint of the current step is written first. A validation is given up
                for it and made up for on resuming.
            TrainingDiverged: loss or gradient not finite; the weights of that step are not saved.
        """
        self.policy.train()
        window = MetricsWindow(progress.unreported)
        with tqdm(
            total=self.timetable.steps,
            initial=progress.step,
            desc=self.description,
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            if progress.validation_due:
                self._validate_and_save(progress)
            for batches in self._batches_by_step(progress):
                window.start_step()
                values = self._step(progress.step, batches, window)
                progress.step += 1
                for batch in batches:
                    progress.count(batch)
                progress.seconds += window.end_step(values, sum(len(b["task"]) for b in batches))
                bar.update()
                if progress.step % self.config.log_every == 0 or progress.step == self.timetable.steps:
                    self._report(progress, window, bar)
                    progress.unreported = {}
                    window = MetricsWindow(progress.unreported)
                self._validate_and_save(progress)
                bar.total = self.timetable.steps
                window.go_on()
                signal_number = self.stop_signal()
                if signal_number is not None:
                    self.save(progress)
                    raise Interrupted(signal_number)
        return progress

    def _batches_by_step(self, progress: Progress) -> Iterator[list[Batch]]:
        """The batches of every step to come. Once shares change the loader starts anew: it fetches ahead."""
        per_step = self.config.gradient_accumulation_steps
        while progress.step < self.timetable.steps and progress.stopped is None:
            raises = len(progress.raises)
            sampler = StepSampler(
                self.order,
                start=progress.step,
                stop=self.timetable.steps,
                batches_per_step=per_step,
                process=self.accelerator.process_index,
            )
            pin_memory = self.accelerator.device.type == "cuda"
            batches = self.dataset.batches(sampler, num_workers=self.num_workers, pin_memory=pin_memory)
            for _ in range(progress.step, self.timetable.steps):
                yield [next(batches) for _ in range(per_step)]
                if progress.stopped is not None or len(progress.raises) > raises:
                    break

    def _step(self, step: int, batches: list[Batch], window: "MetricsWindow") -> dict[str, float]:
        torch.manual_seed(step_seed(self.order.seed, self.order.stage, step, self.accelerator.process_index))
        losses = []
        for number, batch in enumerate(batches):
            window.mark("data")
            augment = partial(self.augment, step=step, number=number)
            prepared = preprocess(batch, self.preprocessor, self.accelerator.device, augment)
            last = number == len(batches) - 1
            with self.accelerator.autocast(), _sync(self.accelerator, self.policy, enabled=last):
                loss, outputs = self.policy(prepared, **self.recurrence.before(batch))
                self.recurrence.after(batch, outputs)
                window.mark("forward")
                self.accelerator.backward(loss / len(batches))
                window.mark("backward")
            losses.append(loss.detach())
        extra = self.extra_loss.add_gradient()
        trainable = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        grad_norm = self.accelerator.clip_grad_norm_(trainable, self.config.grad_clip_norm)
        mean_loss = torch.stack(losses).mean().item()
        if not (math.isfinite(mean_loss) and math.isfinite(float(grad_norm))):
            raise TrainingDiverged(self._explain(step, batches, mean_loss, float(grad_norm)))
        self.optimizer.step()
        self.average.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        window.mark("optimizer")
        return {"loss": mean_loss, "grad_norm": float(grad_norm), **extra}

    def _explain(self, step: int, batches: list[Batch], loss: float, grad_norm: float) -> str:
        names = [
            f"({self.order.tasks[task].name}, {episode}, {frame})"
            for batch in batches
            for task, episode, frame in zip(
                batch["task_position"].tolist(),
                batch["episode_index"].tolist(),
                batch["frame_index"].tolist(),
                strict=True,
            )
        ]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return (
            f"loss {loss} and gradient norm {grad_norm} at step {step + 1} must be finite; "
            f"its samples (task, episode, frame): {', '.join(names[:8])}{more}"
        )

    def _report(self, progress: Progress, window: "MetricsWindow", bar: tqdm) -> None:
        drawn = sum((Counter(each) for each in gather_object([progress.total_drawn()])), Counter())
        values = {
            "epoch": self.timetable.epoch(progress.step),
            "lr": self.optimizer.param_groups[0]["lr"],
            **window.summary(),
            "seconds": round(progress.seconds, 3),
            "task_frames": {self.order.tasks[place].name: n for place, n in sorted(drawn.items())},
        }
        self.log(values, progress.step)
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.1e}, {values['samples_per_s']:.0f} samples/s; ms "
            + ", ".join(f"{part} {values[f'{part}_ms']:.0f}" for part in STEP_PARTS),
            refresh=False,
        )

    def _validate_and_save(self, progress: Progress) -> None:
        if self.timetable.validates(progress.step, every=self.validate_every):
            progress.validation_due = True
            try:
                self._validate(progress)
            except Interrupted:
                self.save(progress)
                raise
            progress.validation_due = False
            self.save(progress)
        elif progress.step % self.config.save_every == 0:
            self.save(progress)

    def _validate(self, progress: Progress) -> None:
        step = progress.step
        found = self.validate(step, self.timetable.number(step))
        self.policy.train()
        if self.result == "last" or found.loss < progress.best_loss:
            progress.best_loss, progress.best_step = found.loss, step
        progress.stopped = found.stop
        if found.shares is not None:
            progress.raises.append({"step": step, "shares": found.shares})
            progress.drawn.append({})
            per_step = self.config.gradient_accumulation_steps
            deal_by(progress.raises[-1], self.order, self.timetable, current=self.current, batches_per_step=per_step)


def step_seed(*key: int) -> int:
    """A 63-bit seed from integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sync(accelerator: Accelerator, policy: Any, *, enabled: bool) -> Any:
    """Gradients of several processes meet once per optimizer step, not once per accumulated batch."""
    return nullcontext() if enabled else accelerator.no_sync(policy)
