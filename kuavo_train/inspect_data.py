"""A dataset at a glance, before it is trained on.

    python -m kuavo_train.inspect_data task=tasks/task2_weighing                 # numbers, and a picture of an episode
    python -m kuavo_train.inspect_data task=tasks/task2_weighing --episode=7     # of another episode

Prints mean, standard deviation, least, most and largest step of every named joint, jumps, idle frames and episodes
recorded twice; saves what the cameras saw and the joints' curves to <outputs>/inspect/<task>_episode<N>.png.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import compose_stage
from kuavo_train.errors import require


def main(composed: DictConfig, overrides: list[str], *, episode: str | None = None) -> int:
    config, _ = compose_stage(composed, overrides)
    require(
        config.strategy != "joint", "strategy", "be one with a stage for each task: it chooses the dataset", "joint"
    )
    # The heavy imports come after the configuration has been found good.
    from kuavo_train.data.images.frames import DecodedFrames
    from kuavo_train.data.inspection import episodes_in_use, overview, save_sheet
    from kuavo_train.data.task import open_task

    task = open_task(config.stage, config.data)
    print(overview(task))
    there = episodes_in_use(task)
    valid = episode is None or (episode.isdigit() and int(episode) in there)
    require(valid, "--episode", f"be one of the {len(there)} episodes in use, {there[0]} to {there[-1]}", episode)
    shown = there[0] if episode is None else int(episode)
    frames = DecodedFrames(task, image_size=None, video_backend=config.data.video_backend)
    sheet = Path(config.outputs) / "inspect" / f"{task.name}_episode{shown}.png"
    print(f"cameras and curves of episode {shown}: {save_sheet(task, frames, shown, sheet)}")
    return 0


def command() -> None:
    own = {word for word in sys.argv if word.startswith("--episode=")}  # Hydra would refuse it
    sys.argv = [word for word in sys.argv if word not in own]
    chosen = max(own, default="").removeprefix("--episode=") or None
    hydra_entry(lambda composed, overrides: main(composed, overrides, episode=chosen))()


if __name__ == "__main__":
    command()
