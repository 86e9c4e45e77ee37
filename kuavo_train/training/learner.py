"""What training changes, one optimizer step at a time: the policy, and all that moves with it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from accelerate import Accelerator
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline

from kuavo_train.config import TrainingConfig
from kuavo_train.data.batch import Batch, preprocess
from kuavo_train.data.images.augmentation import Augmentation, no_augmentation
from kuavo_train.errors import RunError
from kuavo_train.training.carried_memory import NoRecurrence, Recurrence
from kuavo_train.training.company import Company, company_of
from kuavo_train.training.ema import Average, NoAverage, average_of
from kuavo_train.training.extra_loss import ExtraLoss, NoExtraLoss, Outputs
from kuavo_train.training.lora import adapted_state, restore_adapted
from kuavo_train.training.optimizer import build_optimizer
from kuavo_train.training.state import State
from kuavo_train.training.step_metrics import MetricsWindow


class TrainingDiverged(RunError):
    """The loss or the gradient is no longer finite; names the step and the samples."""


@dataclass
class Learner:
    """
    Attributes:
        policy: as accelerate has prepared it.
        recurrence: the memory that goes from one step to the next.
        extra_loss: what a strategy adds to the tasks' own.
        average: of the weights, which is what is validated and handed on.
        company: of the processes that take a step together.
    """

    accelerator: Accelerator
    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    grad_clip_norm: float
    recurrence: Recurrence
    extra_loss: ExtraLoss
    average: Average
    augment: Augmentation
    company: Company

    @classmethod
    def of(
        cls,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline,
        config: TrainingConfig,
        *,
        accelerator: Accelerator,
        steps: int,
        planned: Callable[[int], float] = float,
        recurrence: Recurrence | None = None,
        extra_loss: ExtraLoss | None = None,
        augment: Augmentation = no_augmentation,
        averaged: bool = True,
    ) -> Self:
        """The policy with a new optimizer and schedule.

        Args:
            steps, planned: as `build_optimizer` takes them.
            averaged: whether `training.ema` is kept; False leaves it out.
        """
        optimizer, scheduler = build_optimizer(policy.parameters(), config, steps=steps, planned=planned)
        prepared, optimizer = accelerator.prepare(policy, optimizer)
        return cls(
            accelerator=accelerator,
            policy=prepared,
            preprocessor=preprocessor,
            optimizer=optimizer,
            scheduler=scheduler,
            grad_clip_norm=config.grad_clip_norm,
            recurrence=recurrence or NoRecurrence(),
            extra_loss=extra_loss or NoExtraLoss(),
            average=average_of(policy, config.ema) if averaged else NoAverage(),
            augment=augment,
            company=company_of(accelerator),
        )

    @property
    def bare_policy(self) -> PreTrainedPolicy:
        """The policy itself, without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.policy)

    def learn(self, batches: Sequence[Batch], *, step: int, seed: int, window: MetricsWindow) -> dict[str, float]:
        """One optimizer step on the mean loss of `batches`.

        Args:
            step: from 0; decides what augmentation draws.
            seed: of noise, flow time and dropout; the same in all processes.

        Returns:
            Of all processes together: loss on the actions, the memory's own loss where there is one, norm of the
            gradient before it was clipped, and what the extra loss reports.

        Raises:
            TrainingDiverged: loss or gradient is not finite; the weights are as before.
        """
        drawn = self.company.begin_step(self.bare_policy, [batch.size for batch in batches], seed)
        losses, reports = [], []
        for number, (batch, arguments) in enumerate(zip(batches, drawn, strict=True)):
            window.mark("data")
            augment = partial(self.augment, step=step, number=number)
            prepared = preprocess(batch, self.preprocessor, self.accelerator.device, augment)
            with self.accelerator.autocast(), self._meeting(last=number == len(batches) - 1):
                loss, outputs = self.policy(prepared, **arguments, **self.recurrence.before(batch))
                extra = self.extra_loss.of_batch(prepared, outputs, batch)
                self.recurrence.after(batch, outputs)
                window.mark("forward")
                self.accelerator.backward((loss if extra is None else loss + extra) / len(batches))
                window.mark("backward")
            losses.append(loss.detach())
            reports.append({"loss": loss.detach(), **_parts_of_loss(outputs)})
        of_strategy = self.extra_loss.add_gradient()
        grad_norm = self.accelerator.clip_grad_norm_(_trainable(self.policy.parameters()), self.grad_clip_norm)
        found = [torch.stack([each[name] for each in reports]).mean() for name in reports[0]]
        reported = [found[0].new_tensor(value) for value in of_strategy.values()]
        here = torch.stack([*found, *reported, torch.stack(losses).mean(), grad_norm.to(found[0])])
        # The one time in a step that the device is waited for: what has diverged must not reach the weights.
        *values, mean_loss, norm = self.company.mean(here).tolist()
        means = dict(zip([*reports[0], *of_strategy], values, strict=True))
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"loss {mean_loss} and gradient norm {norm}")
        self.optimizer.step()
        self.average.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        window.mark("optimizer")
        return {**means, "grad_norm": norm}

    def _meeting(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients of several processes meet once per optimizer step, not once per accumulated batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.policy)

    def state_dict(self) -> State:
        """All that a resume needs beside the weights of a checkpoint."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "adapted": adapted_state(self.bare_policy),
            "average": self.average.state_dict(),
            "memory": self.recurrence.state_dict(),
            "extra_loss": self.extra_loss.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        restore_adapted(self.bare_policy, state["adapted"])
        self.average.load_state_dict(state.get("average", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.recurrence.load_state_dict(state["memory"])


def _parts_of_loss(outputs: Outputs) -> dict[str, torch.Tensor]:
    """Those that `SmolVLAMemoryPolicy` reports: on the actions, and of the memory's own."""
    if outputs is None or "memory_loss" not in outputs:
        return {}
    return {name: outputs[name] for name in ("loss", "memory_loss")}


def _trainable(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
