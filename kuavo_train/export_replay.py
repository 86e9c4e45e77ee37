"""What a stage needs of earlier tasks, in one file: their demonstrations may be deleted then.

    python -m kuavo_train.export_replay task=tasks/task2_weighing                    # the words of the stage to come
    python -m kuavo_train.export_replay task=tasks/task2_weighing --file=kept.safetensors
    python -m kuavo_train task=tasks/task2_weighing data.replay_file=kept.safetensors   # trains from it

Writes, of every task learnt before the stage, what `replay.buffer` keeps and the held-out episodes: embeddings of the
frozen image encoder, states, actions and instructions. Prints what each part takes. Without --file it is
<outputs>/<run>/replay_for_<stage>.safetensors. With data.replay_file, tasks are taken over from an earlier file.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from kuavo_train.command_line import hydra_entry
from kuavo_train.compose import compose_stage
from kuavo_train.errors import require


def main(composed: DictConfig, overrides: list[str], *, file: str | None = None) -> int:
    config, curriculum = compose_stage(composed, overrides)
    require(file != "", "--file", "be followed by the path of a file, as --file=PATH", file)
    from kuavo_train.stage.replay_export import export_replay  # heavy, and the configuration comes first

    print(export_replay(config, curriculum, Path(file) if file else None).summary)
    return 0


def command() -> None:
    own = [word.removeprefix("--file=") for word in sys.argv if word.startswith("--file=")]  # Hydra would refuse it
    sys.argv = [word for word in sys.argv if not word.startswith("--file=")]
    chosen = own[-1] if own else None
    hydra_entry(lambda composed, overrides: main(composed, overrides, file=chosen))()


if __name__ == "__main__":
    command()
