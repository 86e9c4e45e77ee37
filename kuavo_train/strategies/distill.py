"""Distillation: `strategy=distill`, or `distill={weight: …}` beside another.

The policy that a stage begins with is its teacher. Where a sample is learnt, at its noisy actions x_t, the policy is to
answer as the teacher answers there:

    w · mean ‖v(x_t, t) − v_teacher(x_t, t)‖²

On the new task's frames it is learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282), in flow matching; on
replayed ones it is dark experience replay (Buzzega et al. 2020, arXiv 2004.07211), with the answers of the stage before
in place of stored ones. Which frames there are is for `mixture` to say.
"""

from copy import deepcopy

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from kuavo_train.config import DistillConfig
from kuavo_train.data.batch import Batch, Prepared
from kuavo_train.strategies.strategy import StageView, Strategy
from kuavo_train.training.carried_memory import Recurrence
from kuavo_train.training.checkpoint import Checkpoint, load_weights
from kuavo_train.training.extra_loss import ExtraLoss, NoExtraLoss, Outputs
from kuavo_train.training.lora import merge_adapters
from kuavo_train.training.state import State


class Distill(Strategy):
    Settings = DistillConfig

    def extra_loss(self, view: StageView) -> ExtraLoss:
        if view.before is None:
            return NoExtraLoss()
        teacher = teacher_of(view.policy, view.before)
        return Distillation(teacher, view.new_memory(teacher), weight=self.settings.weight)


def teacher_of(policy: PreTrainedPolicy, before: Checkpoint) -> PreTrainedPolicy:
    """The policy with the weights of before the stage. What the stage holds fixed, the two have in common."""
    in_common = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    teacher = deepcopy(policy, in_common)
    merge_adapters(teacher)
    load_weights(teacher, before)
    return teacher.requires_grad_(False).eval()


class Distillation(NoExtraLoss):
    """
    Args:
        teacher: of a kind whose forward returns its `flow`; `RunConfig` lets no other through.
        memory: the teacher's own, carried from batch to batch as the policy's is.
    """

    def __init__(self, teacher: PreTrainedPolicy, memory: Recurrence, *, weight: float):
        self.teacher, self.memory, self.weight = teacher, memory, weight
        self.of_step: list[Tensor] = []

    def of_batch(self, prepared: Prepared, outputs: Outputs, batch: Batch) -> Tensor:
        assert outputs is not None
        flow = outputs["flow"]
        with torch.no_grad():
            encoded, memory = self.teacher.encode(prepared, **self.memory.before(batch))
            velocity = self.teacher.velocity(encoded, flow.noisy, flow.time)
        self.memory.after(batch, {"memory": memory} if memory is not None else {})
        distance = flow.loss(velocity)
        self.of_step.append(distance.detach())
        return self.weight * distance

    def add_gradient(self) -> dict[str, float]:
        """There is none; the mean distance from the teacher is reported, unweighted."""
        of_step, self.of_step = self.of_step, []
        return {"distillation": torch.stack(of_step).mean().item()}

    def state_dict(self) -> State:
        return {"teacher_memory": self.memory.state_dict()}

    def load_state_dict(self, state: State) -> None:
        if state:
            self.memory.load_state_dict(state["teacher_memory"])
