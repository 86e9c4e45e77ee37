"""What a cell's job does in a test of the cluster: it hears a signal as a stage does, and is quick."""

import time
from collections.abc import Sequence

from kuavo_train.config import RunConfig
from kuavo_train.interruption import listening


def train_until_warned(configs: Sequence[RunConfig]) -> int:
    """Its first turn lasts until a signal comes, its second one comes to its end; the third cell fails."""
    turns = configs[0].run_folder
    turns.mkdir(parents=True, exist_ok=True)
    if configs[0].seed == 2:
        raise ValueError("the third one fails")
    with listening() as listener:
        (turns / f"turn{len(list(turns.iterdir()))}").touch()
        while len(list(turns.iterdir())) == 1 and listener.number is None:
            time.sleep(0.02)
    return 0 if listener.number is None else 128 + listener.number
