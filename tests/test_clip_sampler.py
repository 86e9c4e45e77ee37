"""Clips of consecutive queries: walks as the robot makes them, shares to the clip, memory never across episodes."""

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from kuavo_train.data.batch import Batch, Origin
from kuavo_train.data.clip_sampler import ClipOrder
from kuavo_train.data.sampler import Draw
from kuavo_train.training.carried_memory import CarriedMemory
from lerobot_policy_smolvla_memory.memory import RecurrentMemory

STRIDE = 4


class Episodes(SimpleNamespace):
    """What an order needs of a task: names, training episodes and their rows."""

    def rows_of(self, episodes: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.arange(*self.bounds[episode]) for episode in episodes])

    def queries_of(self, episodes: Sequence[int]) -> np.ndarray:
        rows = self.rows_of(episodes)
        return rows[(rows - self.bounds[self.episode[rows], 0]) % self.feature_stride == 0]


def task(name: str, lengths: Sequence[int], held_out: int = 1, feature_stride: int = 1) -> Episodes:
    ends = np.cumsum(lengths)
    bounds = np.stack([ends - lengths, ends], axis=1)
    made = Episodes(name=name, bounds=bounds, episode=np.repeat(np.arange(len(lengths)), lengths))
    made.feature_stride = feature_stride
    made.train_episodes = tuple(range(len(lengths) - held_out))
    made.held_out_episodes = tuple(range(len(lengths) - held_out, len(lengths)))
    made.train_rows = made.rows_of(made.train_episodes)
    return made


TASKS = [task("a", [13, 9, 22, 17, 11]), task("b", [30, 8, 12]), task("c", [10, 14, 9, 21])]
SHARES = {"a": 0.1, "b": 0.2, "c": 0.7}


def of_streams(streams: Sequence[int], *, clip: int) -> Batch:
    """A batch of which only the streams are known."""
    import torch

    nothing = torch.zeros(len(streams))
    return Batch({}, [""] * len(streams), Origin(nothing, nothing, nothing, torch.tensor(streams)), clip)


def order_of_clips(**changes) -> ClipOrder:
    settings = {"seed": 0, "stage": 3, "tasks": TASKS, "shares": SHARES, "batch_size": 24, "depth": 3, "stride": STRIDE}
    return ClipOrder(**{**settings, **changes})


def clips(batch: list[Draw], depth: int = 3) -> list[list[Draw]]:
    return [batch[first : first + depth] for first in range(0, len(batch), depth)]


def test_a_stream_walks_one_episode_after_another_at_the_query_stride() -> None:
    order = order_of_clips()
    streams: dict[int, list[Draw]] = {}
    for number in range(60):
        for clip in clips(order.batch(number)):
            assert len({draw.stream for draw in clip}) == 1
            streams.setdefault(clip[0].stream, []).extend(clip)
    for draws in streams.values():
        assert draws[0].begins
        for before, after in pairwise(draws):
            episodes = [TASKS[draw.task].episode[draw.row] for draw in (before, after)]
            if not after.begins:
                assert after.task == before.task
                assert episodes[0] == episodes[1]
                assert after.row == before.row + STRIDE
            else:
                first = TASKS[after.task].bounds[episodes[1], 0]
                assert after.row - first < STRIDE
                assert before.row + STRIDE >= TASKS[before.task].bounds[episodes[0], 1]


def test_shares_hold_to_the_clip_at_every_moment() -> None:
    order = order_of_clips()
    drawn = np.array([draw.task for number in range(50) for draw in order.batch(number)])
    n = np.arange(1, len(drawn) + 1)
    for place, share in enumerate(SHARES.values()):
        assert np.all(np.abs(np.cumsum(drawn == place) - share * n) < 2 * order.clip)
        at_batches = np.cumsum(drawn == place)[order.batch_size - 1 :: order.batch_size]
        assert np.all(np.abs(at_batches - share * n[order.batch_size - 1 :: order.batch_size]) < order.clip)


def test_no_stream_is_asked_twice_in_a_batch() -> None:
    order = order_of_clips()
    for number in range(40):
        streams = [clip[0].stream for clip in clips(order.batch(number))]
        assert len(set(streams)) == len(streams)


def test_every_frame_comes_once_in_as_many_passes_as_the_stride() -> None:
    order = order_of_clips()
    walks = order.walks(0)
    rows: list[int] = []
    while len(rows) < len(TASKS[0].train_rows):
        rows += next(walks)
    assert sorted(rows) == list(TASKS[0].train_rows)


@pytest.mark.parametrize("jitter", [0, 2])
def test_where_every_second_frame_is_cached_walks_keep_the_query_stride_and_no_other_frame_is_drawn(
    jitter: int,
) -> None:
    thinned = [task("a", [13, 9, 22, 17, 11], feature_stride=2), task("b", [30, 8, 12], feature_stride=2)]
    how = {"tasks": thinned, "shares": {"a": 0.5, "b": 0.5}, "stride": 8, "jitter": jitter}
    order = order_of_clips(**how)
    kept = thinned[0].queries_of(thinned[0].train_episodes)
    walks, rows = order.walks(0), []
    while len(rows) < len(kept):
        walk = next(walks)
        apart = set(np.diff(walk))
        assert apart <= ({8} if not jitter else {4, 6, 8, 10, 12})
        rows += walk
    assert set(rows) <= set(kept)
    if not jitter:
        assert sorted(rows) == list(kept)  # each once in 8 / 2 passes
    assert order.steps_per_epoch("a", 1) == -(-len(kept) // 12)


def test_held_out_episodes_are_never_walked() -> None:
    order = order_of_clips()
    for number in range(80):
        for draw in order.batch(number):
            assert TASKS[draw.task].episode[draw.row] not in TASKS[draw.task].held_out_episodes


def test_the_order_is_a_function_of_seed_stage_and_batch() -> None:
    whole = [order_of_clips().batch(number) for number in range(12)]
    order = order_of_clips()
    assert order.batch(9) == whole[9]  # as after a resume
    assert order.batch(3) == whole[3]  # and back
    assert order_of_clips(seed=1).batch(5) != whole[5]
    assert order_of_clips(stage=4).batch(5) != whole[5]


def test_an_order_of_one_process_is_that_of_stages_begun_before_it_could_change() -> None:
    order = order_of_clips()
    drawn = [(draw.task, draw.row, draw.begins) for number in range(60) for draw in order.batch(number)]
    assert sha256(repr(drawn).encode()).hexdigest().startswith("675b74efef7caeea")


def test_after_a_change_of_shares_no_walk_is_lost_and_no_stream_asked_twice() -> None:
    later = {"a": 0.5, "b": 0.1, "c": 0.4}
    order, unchanged = order_of_clips(), order_of_clips()
    order.batch(20)  # as a loader that has fetched ahead
    order.change_shares(later, batch=10)
    streams: dict[int, list[Draw]] = {}
    for number in range(60):
        batch = order.batch(number)
        if number < 10:
            assert batch == unchanged.batch(number)
        asked = [clip[0].stream for clip in clips(batch)]
        assert len(set(asked)) == len(asked)
        assert max(asked) < order.stream_count
        for draw in batch:
            streams.setdefault(draw.stream, []).append(draw)
    for draws in streams.values():
        assert draws[0].begins
        for before, after in pairwise(draws):
            assert after.begins or after.row == before.row + STRIDE
    drawn = np.array([draw.task for number in range(10, 60) for draw in order.batch(number)])
    for place, share in enumerate(later.values()):
        assert abs((drawn == place).sum() - share * len(drawn)) < order.clip
    assert {draw.stream for draw in order.batch(59)} - {draw.stream for draw in unchanged.batch(59)}


@pytest.mark.parametrize(("batch_size", "processes"), [(12, 2), (6, 4), (24, 1)])
def test_several_processes_share_the_clips_of_one(batch_size: int, processes: int) -> None:
    alone, together = order_of_clips(), order_of_clips(batch_size=batch_size, processes=processes)
    for number in (0, 1, 7, 30):
        parts = [together.batch(number, process=rank) for rank in range(processes)]
        assert [draw for part in parts for draw in part] == alone.batch(number)


@pytest.mark.parametrize(("sizes", "processes"), [((12, 24), 2), ((24, 12), 1), ((9, 24, 12), 4)])
def test_when_the_number_of_processes_changes_no_walk_is_lost_and_shares_hold(
    sizes: tuple[int, ...], processes: int
) -> None:
    order = order_of_clips(batch_size=sizes[-1] // processes, processes=processes)
    for place, samples in enumerate(sizes):
        order.change_samples(samples, batch=10 * place)
    streams: dict[int, list[Draw]] = {}
    drawn = []
    for number in range(10 * (len(sizes) - 1), 10 * len(sizes) + 20):  # as the processes of now may draw
        batch = [draw for rank in range(processes) for draw in order.batch(number, process=rank)]
        assert len(batch) == sizes[-1]
        asked = [clip[0].stream for clip in clips(batch)]
        assert len(set(asked)) == len(asked)
        assert max(asked) < order.stream_count
    replay = order_of_clips(batch_size=sizes[-1])
    for place, samples in enumerate(sizes):
        replay.change_samples(samples, batch=10 * place)
    for number in range(10 * len(sizes) + 20):
        for draw in replay.batch(number):
            streams.setdefault(draw.stream, []).append(draw)
            drawn.append(draw.task)
    for draws in streams.values():
        assert draws[0].begins
        for before, after in pairwise(draws):
            assert after.begins or after.row == before.row + STRIDE
    for place, share in enumerate(SHARES.values()):
        assert abs(drawn.count(place) - share * len(drawn)) < order.clip
    began = order_of_clips(batch_size=sizes[0])
    assert [began.batch(number) for number in range(10)] == [replay.batch(number) for number in range(10)]


def test_jitter_moves_queries_within_their_episode() -> None:
    steady, moved = (order_of_clips(jitter=jitter) for jitter in (0, 1))
    difference = [
        b.row - a.row for number in range(20) for a, b in zip(steady.batch(number), moved.batch(number), strict=True)
    ]
    assert set(difference) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5}, "training.batch_size must be a multiple of policy.mem_backprop_depth=5, got 24"),
        ({"jitter": 2}, r"training.query_jitter must be in \[0, policy.n_action_steps / 2 = 2.0\), got 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order_of_clips(**changes)


def test_a_stream_gets_back_the_memory_it_left_and_no_other() -> None:
    import torch

    memory = RecurrentMemory(2, 8)
    carried = CarriedMemory(memory.initial(5))
    batch = of_streams([3, 3, 1, 1], clip=2)
    given = carried.before(batch)
    assert given["queries"] == 2
    written = given["memory"].__class__(torch.stack([torch.full((2, 8), 3.0), torch.full((2, 8), 1.0)]))
    untouched = carried.states.tokens[[0, 2, 4]].clone()
    carried.after(batch, {"memory": written})
    assert torch.equal(carried.states.tokens[3], torch.full((2, 8), 3.0))
    assert torch.equal(carried.before(of_streams([1, 1], clip=2))["memory"].tokens[0], torch.full((2, 8), 1.0))
    assert torch.equal(carried.states.tokens[[0, 2, 4]], untouched)
    restored = CarriedMemory(memory.initial(5))
    restored.load_state_dict(carried.state_dict())
    assert torch.equal(restored.states.tokens, carried.states.tokens)


def test_every_process_knows_what_the_others_wrote_and_streams_may_be_added() -> None:
    import torch

    memory = RecurrentMemory(2, 8)
    other = {"streams": torch.tensor([4]), "tokens": torch.full((1, 2, 8), 4.0)}
    carried = CarriedMemory(
        memory.initial(5), exchange=lambda mine: {key: torch.cat([mine[key], other[key]]) for key in mine}
    )
    state = memory.initial(1)
    carried.after(of_streams([0], clip=1), {"memory": state.__class__(torch.full((1, 2, 8), 7.0))})
    assert carried.states.tokens[:, 0, 0].tolist()[0::4] == [7.0, 4.0]
    grown = CarriedMemory(memory.initial(9))
    grown.load_state_dict(carried.state_dict())
    assert torch.equal(grown.states.tokens[:5], carried.states.tokens)
    assert torch.equal(grown.states.tokens[5:], memory.initial(4).tokens)
