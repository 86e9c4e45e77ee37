"""What a stage records while it runs: JSON lines always, Weights & Biases by choice."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal, Protocol, cast

from kuavo_train.config import RunConfig
from kuavo_train.errors import ConfigError, RunError


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class NoTracker:
    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """A run of Weights & Biases, which goes on when the stage does.

    Args:
        run_id: the stage's own, the same after a resume.

    Raises:
        RunError: it cannot be reached, or refuses the key, the project or the entity.
    """

    def __init__(self, config: RunConfig, *, run_id: str, folder: Path):
        import wandb

        try:
            self.run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                id=run_id,
                resume="allow",
                group=config.run,
                name=f"{config.run}/{config.stage.folder_name}",
                dir=str(folder),
                config=asdict(config),
                mode=cast(Literal["offline", "online"], config.tracking),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:300]
            raise RunError(
                f"tracking={config.tracking} must reach project {config.wandb.project} of Weights & Biases, got "
                f"{reason}; tracking=offline keeps the curves in {folder / 'wandb'}, tracking=off does without"
            ) from error
        # Curves go by our own steps: after a resume wandb would drop those that it has seen.
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def finish(self) -> None:
        self.run.finish()


def make_tracker(config: RunConfig, *, run_id: str, folder: Path) -> Tracker:
    """The trackers that `tracking` names. Errors as `WandbTracker`."""
    return NoTracker() if config.tracking == "off" else WandbTracker(config, run_id=run_id, folder=folder)


def check_tracking(config: RunConfig) -> None:
    """Raises `ConfigError` where nobody is logged in; uses no network."""
    if config.tracking != "online":
        return
    import wandb

    if not wandb.api.api_key:
        raise ConfigError(
            "tracking=online must have a key of Weights & Biases, got none in WANDB_API_KEY or the netrc file; log in "
            "with wandb login, or set tracking=offline, whose curves wandb sync uploads later"
        )
