"""The optimizer, its learning rate over a stage, and the device."""

from collections.abc import Callable, Iterable

import torch
from lerobot.optim import CosineDecayWithWarmupSchedulerConfig

from kuavo_train.config import TrainingConfig
from kuavo_train.errors import ConfigError
from kuavo_train.training.muon import AdamWSettings, Muon, between_hidden_states

ADAM_MOMENTS = 2


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    config: TrainingConfig,
    *,
    steps: int,
    planned: Callable[[int], float] = float,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and a cosine decay with warm-up; LeRobot shortens the schedule when the stage has fewer steps.

    Args:
        planned: step → the step of the plan it stands for, where a stage takes longer than planned.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    settings: AdamWSettings = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    # LeRobot's AdamWConfig knows no `fused`: a third of the plain one's time, on the CPU as well.
    optimizer = (
        Muon(trained, **settings) if config.optimizer == "muon" else torch.optim.AdamW(trained, **settings, fused=True)
    )
    scheduler = CosineDecayWithWarmupSchedulerConfig(
        num_warmup_steps=config.warmup_steps,
        num_decay_steps=config.decay_steps,
        peak_lr=config.lr,
        decay_lr=config.decay_lr,
    ).build(optimizer, steps)
    scheduler.lr_lambdas = [lambda step, rate=rate: rate(planned(step)) for rate in scheduler.lr_lambdas]
    return optimizer, scheduler


def state_bytes(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> int:
    """Of what the optimizer holds of the parameters that train: Adam's two moments, or Muon's one of a matrix."""

    def moments(parameter: torch.nn.Parameter) -> int:
        return 1 if config.optimizer == "muon" and between_hidden_states(parameter) else ADAM_MOMENTS

    return sum(moments(each) * each.nbytes for each in parameters if each.requires_grad)


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises `ConfigError` when the named device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ConfigError(f"training.device must be available, got {name}; use training.device=cpu, or auto")
    return torch.device(name)
