"""Past frames: which queries are kept, what is shown of them, and that carrying them is the same everywhere."""

from itertools import pairwise

import pytest
import torch
from policy_variants import LAYOUTS, every_layout
from tiny_sizes import CAMERAS

from lerobot_policy_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.frames import PastFrames, frame_side
from lerobot_policy_smolvla_memory.memory import RecurrentMemory

RESET, PADDED = "observation.memory_reset", "query_is_pad"
KINDS = {"frames": {"num_mem_tokens": 0}, "both": {}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def memory_of(slots: int, sampling: str) -> RecurrentMemory:
    return RecurrentMemory(0, 4, frames=PastFrames(slots, 1, 1, 4, sampling=sampling))


def query(memory, state, *numbers: float):
    """The state after a query that saw, in each element, nothing but its number; counted from 1, as 0 is empty."""
    frame = torch.tensor(numbers)[:, None, None].expand(-1, 1, 4)
    return memory.write(state, memory.read(state), frame=frame)


def kept(state, element: int = 0) -> list[int]:
    return state.frames[element, :, 0, 0].int().tolist()


def after(queries: int, slots: int, sampling: str) -> list[int]:
    memory = memory_of(slots, sampling)
    state = memory.initial(1)
    for number in range(1, queries + 1):
        state = query(memory, state, number)
    return kept(state)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (0, [0, 0, 0, 0]),
        (3, [1, 2, 3, 0]),
        (4, [1, 2, 3, 4]),
        (5, [1, 3, 5, 0]),
        (8, [1, 3, 5, 7]),
        (9, [1, 5, 9, 0]),
        (40, [1, 17, 33, 0]),
    ],
)
def test_even_keeps_the_multiples_of_a_stride_that_doubles_when_they_no_longer_fit(queries, expected):
    assert after(queries, 4, "even") == expected


@pytest.mark.parametrize("slots", [1, 3, 5, 8])
def test_of_a_long_episode_evenly_spread_queries_are_kept_the_first_among_them(slots):
    for queries in (1, 7, 40, 41):
        numbers = [number for number in after(queries, slots, "even") if number]
        gaps = {later - earlier for earlier, later in pairwise(numbers)}
        assert numbers[0] == 1
        assert len(gaps) <= 1
        assert len(numbers) >= min(queries, slots) / 2


@pytest.mark.parametrize(
    ("queries", "expected"),
    [(1, [0, 0, 0, 1]), (2, [2, 0, 0, 1]), (7, [6, 7, 5, 1]), (12, [12, 11, 5, 9]), (40, [40, 39, 37, 33])],
)
def test_recent_keeps_the_last_query_and_the_sparser_the_farther_back(queries, expected):
    assert after(queries, 4, "recent") == expected


def test_each_element_counts_its_own_queries_when_it_is_reset_on_its_own():
    memory = memory_of(4, "even")
    state = memory.initial(2)
    for number in range(1, 8):
        state = memory.reset(state, torch.tensor([False, number == 5]))
        state = query(memory, state, number, 10 * number)
    assert (kept(state, 0), kept(state, 1)) == ([1, 3, 5, 7], [50, 60, 70, 0])
    assert state.queries.tolist() == [7, 3]


def test_what_is_read_of_a_frame_at_first_is_the_frame_normalised_whatever_its_scale():
    frames = PastFrames(2, 2, 1, 16, sampling="even")
    seen, scaled = (scale * torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)) for scale in (1, 8))
    for frame in (seen, scaled):
        tokens = frames(*frames.remember(*frames.empty(1), frame)).unflatten(1, (2, 2)) - frames.places
        torch.testing.assert_close(tokens[:, 0], torch.nn.functional.rms_norm(seen, (16,)))
        assert not tokens[:, 1].any()


def test_a_frame_is_told_from_an_empty_slot_and_by_how_long_ago_it_was():
    frames = PastFrames(2, 1, 1, 16, sampling="even")
    torch.nn.init.normal_(frames.age.weight)
    torch.nn.init.ones_(frames.nothing)
    state = frames.remember(*frames.empty(1), torch.zeros(1, 1, 16))
    first = frames(*state) - frames.places
    torch.testing.assert_close(first[0, 1], torch.ones(16))
    assert not torch.allclose(first[0, 0], first[0, 1])
    later = frames(*frames.remember(*state, torch.zeros(1, 1, 16))) - frames.places
    torch.testing.assert_close(later[0, 1], first[0, 0])  # one query ago, as the other was then
    assert not torch.allclose(later[0, 0], later[0, 1])


def test_tokens_are_averaged_over_squares_of_a_camera_and_a_camera_that_is_not_there_is_nothing():
    frames = PastFrames(2, 2, 2, 4, sampling="even")
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    tokens = (10 * rows + columns).flatten()[None, :, None].expand(2, -1, 4)
    frame = frames.frame([tokens, tokens + 1], [torch.tensor([True, True]), torch.tensor([True, False])])
    assert frame[:, :, 0].tolist() == [
        [5.5, 7.5, 25.5, 27.5, 6.5, 8.5, 26.5, 28.5],
        [5.5, 7.5, 25.5, 27.5, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("tokens", "cameras", "available", "side"), [(16, 3, 64, 2), (16, 1, 64, 4), (16, 3, 1, 1), (27, 3, 64, 3)]
)
def test_cameras_share_the_tokens_of_a_frame_in_equal_squares(tokens, cameras, available, side):
    assert frame_side(tokens, cameras, available) == side


# ------------------------------------------------------------------ in the policy


@pytest.fixture
def make_keeping(make_policy):
    """A policy that keeps frames, with weights that are not those of the beginning."""

    def make(kind="frames", **changes) -> SmolVLAMemoryPolicy:
        settings = {"mem_frames": 3, "mem_backprop_depth": 1, **KINDS[kind], **changes}
        policy = make_policy(**settings)
        torch.nn.init.normal_(policy.model.memory.frames.age.weight)
        return policy.eval()

    return make


def same(state, other) -> None:
    assert state.shapes == other.shapes
    for name in state.shapes:
        torch.testing.assert_close(getattr(state, name), getattr(other, name))


@every_layout
@every_kind
def test_clips_of_one_query_and_of_eight_give_the_same_and_leave_the_same(
    make_keeping, make_batch, make_noise, layout, kind
):
    policy, batch, noise = make_keeping(kind, **LAYOUTS[layout]), make_batch(16), make_noise(16)
    batch[RESET] = torch.zeros(16).bool()
    batch[RESET][[5, 12]] = True
    batch[PADDED] = torch.zeros(16).bool()
    batch[PADDED][[2, 15]] = True
    at_once, output = policy(dict(batch), **noise, queries=8, reduction="none")
    memory, one_by_one = None, []
    for number in range(8):
        rows = {key: value[number::8] for key, value in batch.items()}
        draws = {key: value[number::8] for key, value in noise.items()}
        loss, carried = policy(rows, **draws, memory=memory, reduction="none")
        memory = carried["memory"]
        one_by_one.append(loss)
    torch.testing.assert_close(at_once, torch.stack(one_by_one, dim=1).flatten())
    same(output["memory"], memory)
    assert memory.queries.tolist() == [3, 3]


@every_kind
def test_what_select_action_carries_is_what_training_carries(make_keeping, make_batch, kind):
    policy, trained = make_keeping(kind), None
    for number in range(5):
        batch = make_batch(2, seed=number)
        trained = policy(dict(batch), memory=trained)[1]["memory"]
        for _ in range(policy.config.n_action_steps):
            policy.select_action(batch)
    same(policy.get_memory(), trained)
    assert policy.get_memory().queries.tolist() == [5, 5]


@every_kind
def test_actions_depend_on_a_query_that_is_long_over(make_keeping, make_batch, make_noise, kind):
    policy, last = make_keeping(kind), []
    for first in (1, 2):
        policy.reset()
        for seed in (first, 3, 4, 5, 6):
            policy.predict_action_chunk(make_batch(2, seed=seed), make_noise(2)["noise"])
        last.append(policy.predict_action_chunk(make_batch(2), make_noise(2)["noise"]))
    assert not torch.allclose(*last, atol=1e-4)


def test_an_element_reset_on_its_own_begins_with_no_frames(make_keeping, make_batch):
    policy = make_keeping()
    for seed in range(2):
        policy.predict_action_chunk(make_batch(2, seed=seed))
    policy.reset([1])
    assert policy.get_memory().queries.tolist() == [2, 0]
    assert not policy.get_memory().frames[1].any()
    assert policy.get_memory().frames[0, :2].any(dim=(1, 2)).all()


@every_layout
def test_frames_alone_join_a_policy_without_a_trace_as_far_as_they_weigh_nothing(
    make_keeping, make_policy, make_batch, make_noise, layout, tmp_path
):
    plain = make_policy(num_mem_tokens=0).eval()
    plain.save_pretrained(tmp_path)
    config = make_keeping(**LAYOUTS[layout], mem_weight=1e-6).config
    joined = SmolVLAMemoryPolicy.from_pretrained(tmp_path, config=config).eval()
    batch, noise = make_batch(2), make_noise(2)["noise"]
    torch.testing.assert_close(
        joined.predict_action_chunk(batch, noise), plain.predict_action_chunk(batch, noise), rtol=1e-3, atol=1e-4
    )
    assert joined.model.memory.first_position == -6  # three frames of a token for each of two cameras


@every_kind
def test_a_checkpoint_keeps_frames_and_gives_the_same_actions(make_keeping, make_batch, make_noise, kind, tmp_path):
    policy = make_keeping(kind, mem_frame_sampling="recent")
    policy.save_pretrained(tmp_path)
    again = SmolVLAMemoryPolicy.from_pretrained(tmp_path)
    for seed in range(3):
        batch, noise = make_batch(2, seed=seed), make_noise(2)["noise"]
        assert torch.equal(policy.predict_action_chunk(batch, noise), again.predict_action_chunk(batch, noise))
    same(policy.get_memory(), again.get_memory())


@every_kind
def test_features_in_place_of_pictures_are_the_same_frames(make_keeping, make_batch, kind):
    policy, batch = make_keeping(kind), make_batch(2)
    features = {
        camera.replace("images", "image_features", 1): policy.embed_camera(batch[camera]).detach() for camera in CAMERAS
    }
    rest = {key: value for key, value in batch.items() if key not in CAMERAS}
    same(*(policy(given)[1]["memory"] for given in (batch, {**rest, **features})))


def test_all_parameters_of_frames_learn_while_the_vlm_is_frozen(make_keeping, make_batch, make_noise):
    policy = make_keeping(freeze_vision_encoder=True, train_expert_only=True).train()
    policy(make_batch(8), **make_noise(8), queries=4)[0].backward()
    assert all(parameter.grad.any() for parameter in policy.model.memory.parameters())


def test_nothing_is_trained_of_frames_that_were_carried_in(make_keeping, make_batch, make_noise):
    policy = make_keeping().train()
    _, output = policy(make_batch(2), **make_noise(2))
    assert not output["memory"].frames.requires_grad
    policy(make_batch(2, seed=1), **make_noise(2), memory=output["memory"])[0].backward()


def test_frames_alone_have_none_of_the_recurrent_memorys_parts(make_keeping):
    names = {name.split(".")[0] for name, _ in make_keeping(mem_action_loss=1.0).model.memory.named_parameters()}
    assert names == {"frames"}


def test_more_frames_than_a_checkpoint_has_are_another_memorys_state(make_keeping):
    with pytest.raises(ValueError, match=r"must be of shapes .*'frames': \(1, 4, 2, 32\).*, got .*\(1, 3, 2, 32\)"):
        make_keeping(mem_frames=4).set_memory(make_keeping().model.memory.initial(1))


def test_a_frame_of_fewer_tokens_than_cameras_is_refused(make_keeping):
    with pytest.raises(ValueError, match=r"mem_frame_tokens must be at least one for each of the 2 cameras.* got 1"):
        make_keeping(mem_frame_tokens=1)
