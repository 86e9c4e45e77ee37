"""The small base that simulated runs start from: `python -m kuavo_train.base [profile=smoke key=value …]`.

It records the generic skills of kuavo_sim (no job is among them), teaches a policy without memory all of them at once,
and writes what came out as a LeRobot checkpoint: to models/kuavo_sim_base, or of a run of another name into its own
folder. It is an ordinary run with other tasks: what was cut off goes on where it stood, and `training.epochs=…` with
another `run=…` makes a longer one. `policy=smolvla_memory config_dir=configs/cue_skills` makes a base that has met a
memory, from skills with cues besides.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import check_no_study, check_overrides, compose_run, stages_to_run
from kuavo_train.config import CONFIG_FOLDER, RunConfig
from kuavo_train.curriculum import train_all_stages
from kuavo_train.runs.files import copy_folder

PROFILE, POLICY = "base", "smolvla"
FOLDER = Path("models") / "kuavo_sim_base"
SETTLED = (
    f"tasks_dir={CONFIG_FOLDER / 'skills'}",
    "strategy=joint",
    f"policy={POLICY}",
    "policy.flow_draws=2",  # a step's prefix serves two: less noise in the gradient for a fifth of a step
    "tiny_vlm.corpus=words",  # tokens that do not depend on who goes on from it
    "tiny_vlm.vocabulary_size=1024",
)
"""What a base is, whatever its size."""


def main(_composed: DictConfig, overrides: list[str]) -> int:
    check_overrides(overrides)
    check_no_study(overrides)
    configs = compose_run(overrides)
    if configs[0].data_only:
        from kuavo_train.stage.setup import record_missing_data  # heavy, and the configuration comes first

        record_missing_data(configs[0], [config.stage for config in configs])
        return 0
    status = train_all_stages(configs)
    if status or os.environ.get("RANK", "0") != "0":  # of several processes, the first one hands out
        return status
    into = folder_of(configs[0])
    print(f"base: {into}, sha256 of its weights {hand_out(stages_to_run(configs)[0], into)}")
    return 0


def folder_of(config: RunConfig) -> Path:
    """Where a run's base is written: one tried out does not replace the one that simulated runs start from."""
    return FOLDER if config.profile == config.run == PROFILE else config.run_folder / FOLDER.name


def hand_out(stage: RunConfig, into: Path) -> str:
    """Copy a finished stage's result to the folder `into`, in place of what was there; the sha256 of its weights."""
    from kuavo_train.runs.run_folder import stage_folder

    copy_folder(stage_folder(stage).checkpoints.at("best").pretrained_model, into)
    return hashlib.sha256((into / "model.safetensors").read_bytes()).hexdigest()


def with_settled(words: Sequence[str]) -> list[str]:
    """A command line's words after what makes the run a base's; its name says profile and policy if they are others."""
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    profile = [] if "profile" in given else [f"profile={PROFILE}"]
    of = ((given.get("profile"), PROFILE), (given.get("policy"), POLICY))
    others = [value for value, usual in of if value not in (None, usual)]
    run = [] if "run" in given else [f"run={'-'.join([PROFILE, *others])}"]
    return [*profile, *SETTLED, *run, *words]


def command() -> None:
    sys.argv[1:] = with_settled(sys.argv[1:])
    hydra_entry(main)()


if __name__ == "__main__":
    command()
