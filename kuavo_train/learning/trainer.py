"""The loop: batch → loss → step. Knows no task names and no files.

The randomness of step n (noise, time, dropout) is a pure function of (seed, stage, n, process), and so is the
order of samples. A resumed run therefore needs weights, optimizer, scheduler and the step, and continues
bit-identically; what validation draws cannot touch it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from kuavo_train.config import RunError, TrainingConfig
from kuavo_train.data.mixture import Batch, MixedDataset, preprocess
from kuavo_train.data.order import Order, StepSampler
from kuavo_train.learning.recurrence import Recurrence


class TrainingDiverged(RunError):
    """The loss or the gradient is no longer finite; names the step and the samples."""


class Interrupted(Exception):
    """A signal asked for the end; the checkpoint of `step` is written."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"signal {signal_number} at step {step}")
        self.signal_number, self.step = signal_number, step


@dataclass
class Progress:
    """Where a stage stands; everything a resume needs beside weights, optimizer and scheduler.

    Attributes:
        drawn: place of a task in the mixture → frames drawn so far.
        best_step, best_loss: of the checkpoint with the least held-out loss over all tasks seen.
    """

    step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)
    drawn_episodes: dict[int, list[int]] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float = math.inf
    seconds: float = 0.0

    def count(self, batch: Batch) -> None:
        """Add the samples of a batch that was really drawn."""
        places = batch["task_position"]
        for place in places.unique().tolist():
            mine = places == place
            self.drawn[place] = self.drawn.get(place, 0) + int(mine.sum())
            episodes = set(self.drawn_episodes.get(place, [])) | set(batch["episode_index"][mine].tolist())
            self.drawn_episodes[place] = sorted(episodes)


@dataclass
class Trainer:
    """One stage's optimization.

    `log(values, step)` receives metrics; `validate(step, epoch)` returns the mean held-out loss over all tasks
    seen; `save(progress)` writes a checkpoint; `stop_signal()` returns a signal number once one has arrived.
    """

    accelerator: Accelerator
    policy: Any
    preprocessor: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    dataset: MixedDataset
    order: Order
    recurrence: Recurrence
    config: TrainingConfig
    steps: int
    steps_per_epoch: int
    validate_every: int  # epochs
    num_workers: int
    log: Callable[[dict[str, Any], int], None]
    validate: Callable[[int, int], float]
    save: Callable[[Progress], None]
    stop_signal: Callable[[], int | None]
    description: str = "train"

    def run(self, progress: Progress) -> Progress:
        """Train from `progress.step` to the end.

        Raises:
            Interrupted: a signal arrived; a checkpoint of the current step is written first.
            TrainingDiverged: loss or gradient not finite; the weights of that step are not saved.
        """
        self.policy.train()
        window = MetricsWindow()
        with tqdm(
            total=self.steps,
            initial=progress.step,
            desc=self.description,
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            for batches in self._batches_by_step(progress.step):
                window.start_step()
                loss, grad_norm = self._step(progress.step, batches, window)
                progress.step += 1
                for batch in batches:
                    progress.count(batch)
                progress.seconds += window.end_step(loss, grad_norm, sum(len(b["task"]) for b in batches))
                bar.update()
                if progress.step % self.config.log_every == 0 or progress.step == self.steps:
                    self._report(progress, window, bar)
                    window = MetricsWindow()
                self._validate_and_save(progress)
                window.go_on()
                signal_number = self.stop_signal()
                if signal_number is not None:
                    self.save(progress)
                    raise Interrupted(signal_number, progress.step)
        return progress

    def _batches_by_step(self, start: int) -> Iterator[list[Batch]]:
        per_step = self.config.gradient_accumulation_steps
        sampler = StepSampler(
            self.order,
            start=start,
            stop=self.steps,
            batches_per_step=per_step,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        pin_memory = self.accelerator.device.type == "cuda"
        batches = iter(self.dataset.loader(sampler, num_workers=self.num_workers, pin_memory=pin_memory))
        for _ in range(start, self.steps):
            yield [next(batches) for _ in range(per_step)]

    def _step(self, step: int, batches: list[Batch], window: "MetricsWindow") -> tuple[float, float]:
        torch.manual_seed(step_seed(self.order.seed, self.order.stage, step, self.accelerator.process_index))
        losses = []
        for number, batch in enumerate(batches):
            window.mark("data")
            prepared = preprocess(batch, self.preprocessor)
            last = number == len(batches) - 1
            with self.accelerator.autocast(), _sync(self.accelerator, self.policy, enabled=last):
                loss, outputs = self.policy(prepared, **self.recurrence.before(batch))
                self.recurrence.after(batch, outputs)
                window.mark("forward")
                self.accelerator.backward(loss / len(batches))
                window.mark("backward")
            losses.append(loss.detach())
        trainable = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        grad_norm = self.accelerator.clip_grad_norm_(trainable, self.config.grad_clip_norm)
        mean_loss = torch.stack(losses).mean().item()
        if not (math.isfinite(mean_loss) and math.isfinite(float(grad_norm))):
            raise TrainingDiverged(self._explain(step, batches, mean_loss, float(grad_norm)))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        window.mark("optimizer")
        return mean_loss, float(grad_norm)

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
        values = {
            "epoch": progress.step / self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **window.summary(),
            "seconds": round(progress.seconds, 3),
            "task_frames": {self.order.tasks[place].name: n for place, n in sorted(progress.drawn.items())},
        }
        self.log(values, progress.step)
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.1e}, {values['samples_per_s']:.0f} samples/s", refresh=False
        )

    def _validate_and_save(self, progress: Progress) -> None:
        epoch, into_epoch = divmod(progress.step, self.steps_per_epoch)
        ends = progress.step == self.steps
        if ends or (into_epoch == 0 and epoch % self.validate_every == 0):
            loss = self.validate(progress.step, math.ceil(progress.step / self.steps_per_epoch))
            self.policy.train()
            if loss < progress.best_loss:
                progress.best_loss, progress.best_step = loss, progress.step
            self.save(progress)
        elif progress.step % self.config.save_every == 0:
            self.save(progress)


class MetricsWindow:
    """Means over the steps since the last report, with the time each part of a step took."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.samples = 0
        self.parts: dict[str, float] = {}
        self.began = self.marked = time.perf_counter()

    def start_step(self) -> None:
        """The batch has arrived: the time since the last step went into waiting for it."""
        self.parts["wait"] = self.parts.get("wait", 0.0) + time.perf_counter() - self.marked
        self.marked = time.perf_counter()

    def go_on(self) -> None:
        """What came between two steps, such as a validation, is not their time."""
        self.began = self.marked = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.marked
        self.marked = now

    def end_step(self, loss: float, grad_norm: float, samples: int) -> float:
        """Returns the seconds since the window, or the step before, ended."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.samples += samples
        now = time.perf_counter()
        elapsed, self.began = now - self.began, now
        self.parts["total"] = self.parts.get("total", 0.0) + elapsed
        return elapsed

    def summary(self) -> dict[str, float]:
        steps, total = len(self.losses), self.parts["total"]
        parts = {f"{part}_ms": round(1e3 * s / steps, 3) for part, s in self.parts.items() if part != "total"}
        return {
            "loss": float(np.mean(self.losses)),
            "grad_norm": float(np.mean(self.grad_norms)),
            "samples_per_s": round(self.samples / total, 2),
            **parts,
        }


def step_seed(*key: int) -> int:
    """A 63-bit seed from integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sync(accelerator: Accelerator, policy: Any, *, enabled: bool) -> Any:
    """Gradients of several processes meet once per optimizer step, not once per accumulated batch."""
    return nullcontext() if enabled else accelerator.no_sync(policy)
