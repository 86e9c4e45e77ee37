"""Episodes as videos: which are shown, that every step is there, and that what the pictures say is what happened."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from kuavo_train.evaluation.episodes import Episode, Trace, best_and_typical, picked
from kuavo_train.evaluation.videos import Caption, write_video

STEPS, FPS = 12, 20


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, "jpeg")
    return file.getvalue()


def episode(seed: int = 0, *, traced: bool = False, **known: Any) -> Episode:
    trace = Trace(
        [{"head": jpeg(10 * step), "wrist": jpeg(250)} for step in range(STEPS)],
        [np.array([step, 1.0]) for step in range(STEPS)],
    )
    usual: dict[str, Any] = {"success": True, "progress": 1.0, "reward": 2.0, "steps": STEPS, "roughness": 0.1}
    reached = {"subgoals": {"picked": 4, "placed": STEPS}, "cue": 1, "choice": 1, "chosen_at": 6}
    return Episode(seed=seed, trace=trace if traced else None, **(usual | reached | known))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    path = tmp_path_factory.mktemp("videos") / "best.mp4"
    write_video(
        path, episode(traced=True), Caption("memory, weighing", "weigh the parcel " * 12, FPS, cues=("red", "blue"))
    )
    assert Image.open(path.with_suffix(".png")).size[0] == 640
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == FPS
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_step_is_shown_and_the_end_stays_a_while(frames: list[np.ndarray]) -> None:
    assert len(frames) == STEPS + 1.5 * FPS
    heads = [int(frame[180:260, 40:200].mean()) for frame in frames]  # within the first camera's picture
    assert heads[:STEPS] == pytest.approx([10 * step for step in range(STEPS)], abs=6)
    assert heads[STEPS:] == pytest.approx([10 * (STEPS - 1)] * 30, abs=6)


def test_a_subgoal_is_ticked_in_the_step_that_reached_it(frames: list[np.ndarray]) -> None:
    height = frames[0].shape[0]
    panel = [frame[height - 130 : height, 16:34].astype(int) for frame in frames]  # where the ticks stand
    green = [int(((tick[..., 1] - tick[..., 0]) > 40).sum()) for tick in panel]
    assert not any(green[:4])
    assert green[4] > 0
    assert green[STEPS] > 1.5 * green[STEPS - 1]  # the second, reached by the last step


def test_best_typical_and_worst_are_picked_by_success_then_progress_then_steps() -> None:
    episodes = [
        episode(0, success=False, progress=0.5),
        episode(1, steps=80),
        episode(2, steps=60),
        episode(3, success=False, progress=0.0),
        episode(4, success=False, progress=0.25),
    ]
    assert [(rank, e.seed) for rank, e in picked(episodes, 3)] == [("best", 2), ("typical", 0), ("worst", 3)]
    assert [(rank, e.seed) for rank, e in picked(episodes, 1)] == [("typical", 0)]
    assert [e.seed for _, e in picked(episodes, 9)] == [2, 1, 0, 4, 3]
    assert [(rank, e.seed) for rank, e in best_and_typical(episodes)] == [("best", 2), ("typical", 0)]
    assert [(rank, e.seed) for rank, e in best_and_typical(episodes[:2])] == [("best", 1)]
    assert picked([], 3) == []
    assert [rank for rank, _ in picked(episodes[:1], 3)] == ["best"]


def test_an_episode_without_a_trace_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episode 7 must have a trace to be shown: roll it out with traces=True"):
        write_video(tmp_path / "it.mp4", episode(7), Caption("it", "do it", FPS))
