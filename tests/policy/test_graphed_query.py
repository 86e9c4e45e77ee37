"""A query in CUDA graphs: what a recording needs of it, proven on tensors that pretend a GPU, and the replay itself,
with a stand-in that records on the CPU. The last tests need a GPU."""

import pytest
import torch
from graphs_on_cpu import StandIn
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from policy_variants import LAYOUTS
from tiny_sizes import ACTION_DIM, CHUNK
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import SIZES, new_policy
from benchmarks.models import make_batch as make_full_batch
from lerobot_policy_smolvla_memory import graphed_query
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import ENCODED_CONTEXT, image_features_key
from lerobot_policy_smolvla_memory.flow import integrate
from lerobot_policy_smolvla_memory.graphed_query import use_cuda_graphs
from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.vision import encode_pictures

FRAMES = {"mem_frames": 3, "mem_backprop_depth": 2}
VARIANTS = {
    "no memory": {"num_mem_tokens": 0},
    **LAYOUTS,
    "both, awaiting the backbone": {**LAYOUTS["both"], "mem_reads_context": False},
    "a cache": {"read_mem_from_cache": True, "mem_update": "overwrite"},
    "frames": {**FRAMES, "num_mem_tokens": 0},
    "frames and tokens": {**FRAMES, "mem_frame_sampling": "recent"},
    "an empty camera and brackets": {"empty_cameras": 1, "add_image_special_tokens": True},
    "cooler": {"sampling_temperature": 0.5},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs a GPU")


class Operations(TorchDispatchMode):
    """What runs inside it: names and shapes, whether something lay on the CPU, or was chosen by values."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence: list[tuple] = []
        self.on_the_host: list[str] = []
        self.chosen_by_values: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        name = str(function)
        self.sequence.append((name, *(tuple(tensor.shape) for tensor in tensors)))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.on_the_host.append(name)
        # CUDA counts what a mask chooses, and waits for the count, though FakeTensor lets a mask that is written pass
        if "index" in name and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tree_leaves(args[1])):
            self.chosen_by_values.append(name)
        return result


def observation(make_batch, rows: int = 2, *, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
    """One of an episode: with another seed all of it differs, which dimensions are absent and who begins anew, too."""
    batch = make_batch(rows, seed=seed + step)
    del batch["action"]
    batch["action_dim_is_pad"] = torch.arange(ACTION_DIM).expand(rows, -1) >= ACTION_DIM - seed % 2
    batch["observation.memory_reset"] = torch.arange(rows) < (seed % 2)
    batch["observation.language.attention_mask"] = batch["observation.language.attention_mask"].roll(seed, dims=0)
    return batch


def noise(rows: int = 2, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, CHUNK, 8, generator=torch.Generator().manual_seed(seed))


def remembered(policy, make_batch, queries: int) -> MemoryState | None:
    """After so many queries; None without memory."""
    memory = policy.model.memory and policy.model.memory.initial(2).detach().contiguous()
    for step in range(queries):
        _, memory = policy.sample_actions_with(observation(make_batch, step=step), memory, noise())
    return memory


def assert_same(answer: tuple[Tensor, MemoryState | None], expected: tuple[Tensor, MemoryState | None]) -> None:
    assert torch.equal(answer[0], expected[0])
    assert (answer[1] is None) == (expected[1] is None)
    if answer[1] is not None:
        assert answer[1].shapes == expected[1].shapes
        for (name, mine), (_, theirs) in zip(answer[1].tensors(), expected[1].tensors(), strict=True):
            assert torch.equal(mine, theirs), name


# ------------------------------------------------------------------------------------ what a recording needs of a query


def followed_on_a_pretended_gpu(policy, batch: dict[str, Tensor], memory: MemoryState | None) -> Operations:
    """A query on tensors without values, as the policy's own from here on, that say they lie on a GPU."""
    with detect_fake_mode([*policy.parameters()]) or FakeTensorMode() as fake, torch.no_grad():

        def moved(tensor: Tensor) -> Tensor:
            return (tensor if fake.is_our_fake(tensor) else fake.from_tensor(tensor)).to("cuda")

        for module in policy.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: moved(tensor) for name, tensor in held.items() if tensor is not None})
        given = {name: moved(tensor) for name, tensor in batch.items()}
        before, rows = memory and memory._each(moved), len(batch["observation.state"])
        draws = torch.empty(rows, policy.config.chunk_size, policy.config.max_action_dim, device="cuda")
        with Operations() as operations:
            actions, after = policy.sample_actions_with(given, before, draws)
    assert actions.device.type == "cuda"
    assert (after and after.shapes) == (memory and memory.shapes)
    assert len(operations.sequence) > 100
    return operations


@every_variant
def test_a_query_looks_at_no_value_and_brings_nothing_from_the_host(make_policy, make_batch, variant):
    policy = make_policy(**VARIANTS[variant]).eval()
    memory = remembered(policy, make_batch, 1)
    operations = followed_on_a_pretended_gpu(policy, observation(make_batch), memory)
    assert operations.on_the_host == []
    assert operations.chosen_by_values == []


def test_nor_does_one_whose_pictures_and_context_went_through_the_model_before(make_policy, make_batch):
    policy, batch = make_policy().eval(), observation(make_batch)
    batch[ENCODED_CONTEXT] = policy.encode_context(batch).detach()
    for camera in list(policy.config.image_features):
        batch[image_features_key(camera)] = policy.embed_camera(batch.pop(camera)).detach()
    operations = followed_on_a_pretended_gpu(policy, batch, remembered(policy, make_batch, 0))
    assert operations.on_the_host == []
    assert operations.chosen_by_values == []


def test_nor_does_one_of_the_model_of_450_million_with_ten_steps(tmp_path):
    size = SIZES["full"]
    with FakeTensorMode():
        policy = new_policy(size, size.make_vlm(tmp_path), tokens=4).eval()
    assert 440e6 < sum(parameter.numel() for parameter in policy.parameters()) < 500e6
    assert policy.config.num_steps == 10
    operations = followed_on_a_pretended_gpu(policy, make_full_batch(size, rows=1), policy.model.memory.initial(1))
    assert operations.on_the_host == []
    assert operations.chosen_by_values == []


@every_variant
def test_queries_with_other_values_are_the_same_operations_on_the_same_shapes(make_policy, make_batch, variant):
    policy = make_policy(**VARIANTS[variant]).eval()
    sequences = []
    for seed, queries in ((0, 0), (1, 1), (7, 5)):
        memory = remembered(policy, make_batch, queries)
        with Operations() as operations:
            policy.sample_actions_with(observation(make_batch, seed=seed), memory, noise(seed=seed))
        sequences.append(operations.sequence)
    assert sequences[0] == sequences[1] == sequences[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (16, 32), (48, 16)])
def test_whole_pictures_are_encoded_as_by_transformers_to_the_bit(make_policy, dtype, size):
    model = make_policy().model.vlm_with_expert
    vision = model.get_vlm_model().vision_model.to(dtype)
    with torch.no_grad():
        vision.embeddings.position_embedding.weight.normal_()
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = vision(pictures.to(dtype)).last_hidden_state
    mine = encode_pictures(vision, pictures)
    assert torch.equal(mine, theirs)
    for gradients in zip(
        *(torch.autograd.grad(each.sum(), [*vision.parameters()]) for each in (mine, theirs)), strict=True
    ):
        assert torch.equal(*gradients)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_flow_is_followed_as_by_lerobot_to_the_bit(steps):
    times = []

    def velocity(x_t: Tensor, time: Tensor) -> Tensor:
        times.append(time.tolist())
        return (x_t + time[:, None, None]).sin()

    mine = integrate(velocity, noise(), steps)
    assert torch.equal(mine, euler_integrate(velocity, noise(), steps))
    assert times[:steps] == times[steps:]


def test_actions_and_times_are_embedded_as_by_lerobot_to_the_bit(make_policy):
    model, time = make_policy().model, torch.tensor([1.0, 0.3])
    assert torch.equal(model._embed_actions(noise(), time), model.embed_suffix(noise(), time)[0])


# --------------------------------------------------------------------------------------------------- replays on the CPU


@every_variant
def test_an_episode_in_graphs_is_the_one_without_to_the_bit(make_policy, make_batch, variant):
    plain, graphed = (make_policy(**VARIANTS[variant]).eval() for _ in range(2))
    use_cuda_graphs(graphed, StandIn)
    memories: list[MemoryState | None] = [None, None]
    for step in range(5):
        seen, drawn = observation(make_batch, seed=step % 2, step=step), noise(seed=step)
        answers = [
            policy.sample_actions_with(dict(seen), memory, drawn)
            for policy, memory in zip((plain, graphed), memories, strict=True)
        ]
        assert_same(answers[1], answers[0])
        memories = [memory for _, memory in answers]
    assert graphed.graphed._recorded._capture.recordings == 1


def test_the_robot_acts_in_graphs_as_without(make_policy, make_batch):
    plain, graphed = make_policy().eval(), make_policy().eval()
    use_cuda_graphs(graphed, StandIn)
    for step in range(6):
        batch = make_batch(2, seed=step)
        batch["observation.memory_reset"] = torch.tensor([False, step == 3])
        actions = [policy.select_action(dict(batch), noise(seed=step)) for policy in (plain, graphed)]
        assert torch.equal(actions[1], actions[0])
    assert_same((actions[1], graphed.get_memory()), (actions[0], plain.get_memory()))


def test_answers_depend_on_what_was_copied_in_and_outlive_the_next_query(make_policy, make_batch):
    policy = make_policy().eval()
    use_cuda_graphs(policy, StandIn)
    seen, drawn = observation(make_batch), noise()
    memory = remembered(policy, make_batch, 2)
    policy.graphed._recorded._recordings.clear()
    first = policy.sample_actions_with(seen, memory, drawn)
    kept = first[0].clone(), first[1].clone()
    for tensor in (*seen.values(), drawn, *(tensor for _, tensor in memory.tensors())):
        tensor.zero_()  # what was handed in is the caller's again
    (recording,) = policy.graphed._recorded._recordings.values()
    recording.replay()
    assert torch.equal(recording.answers["actions"], kept[0])
    other = policy.sample_actions_with(observation(make_batch, seed=1), kept[1], noise(seed=1))
    assert not torch.equal(other[0], kept[0])
    assert_same(first, kept)


def test_without_noise_it_is_drawn_as_without_graphs(make_policy, make_batch):
    plain, graphed = make_policy().eval(), make_policy().eval()
    use_cuda_graphs(graphed, StandIn)
    answers = []
    for policy in (plain, graphed):
        torch.manual_seed(5)
        answers += [[policy.sample_actions_with(observation(make_batch, seed=seed)) for seed in range(2)]]
    for mine, theirs in zip(answers[1], answers[0], strict=True):
        assert_same(mine, theirs)


def test_other_shapes_and_layouts_are_recorded_once_each(make_policy, make_batch):
    plain, graphed = make_policy().eval(), make_policy().eval()
    use_cuda_graphs(graphed, StandIn)
    queries = {rows: observation(make_batch, rows) for rows in (1, 2, 3)}
    camera = next(iter(plain.config.image_features))
    queries["laid out as a camera gives it"] = {
        **queries[2],
        camera: queries[2][camera].contiguous(memory_format=torch.channels_last),
    }
    for _ in range(2):
        for query in queries.values():
            drawn = noise(len(query["observation.state"]))
            assert_same(graphed.sample_actions_with(query, None, drawn), plain.sample_actions_with(query, None, drawn))
    assert graphed.graphed._recorded._capture.recordings == 4


def test_the_latest_recordings_are_kept(make_policy, make_batch, monkeypatch):
    monkeypatch.setattr(graphed_query, "MOST_KEPT", 2)
    policy = make_policy(num_mem_tokens=0).eval()
    use_cuda_graphs(policy, StandIn)

    def recordings_after(rows: int) -> int:
        policy.sample_actions_with(observation(make_batch, rows), None, noise(rows))
        return policy.graphed._recorded._capture.recordings

    assert [recordings_after(rows) for rows in (1, 2, 1, 3, 1, 2)] == [1, 2, 2, 3, 3, 4]


def test_weights_that_change_where_they_lie_are_read_and_others_are_recorded_anew(make_policy, make_batch):
    plain, graphed = make_policy().eval(), make_policy().eval()
    use_cuda_graphs(graphed, StandIn)
    seen = observation(make_batch)

    def recordings() -> int:
        assert_same(graphed.sample_actions_with(seen, None, noise()), plain.sample_actions_with(seen, None, noise()))
        return graphed.graphed._recorded._capture.recordings

    first = graphed.graphed._recorded
    assert recordings() == 1
    others = make_policy(seed=1).state_dict()
    for policy in (plain, graphed):
        policy.load_state_dict(others)
    assert recordings() == 1
    assert graphed.graphed._recorded is first
    for policy in (plain, graphed):
        policy.compute_in(torch.bfloat16)
    assert recordings() == 1
    assert graphed.graphed._recorded is not first
    second = graphed.graphed._recorded
    for policy in (plain, graphed):
        policy.load_state_dict({name: tensor.clone() for name, tensor in others.items()}, assign=True)
    assert recordings() == 1
    assert graphed.graphed._recorded is not second


def test_what_a_query_reads_of_the_config_is_recorded_with_it(make_policy, make_batch):
    plain, graphed = make_policy().eval(), make_policy().eval()
    use_cuda_graphs(graphed, StandIn)
    seen = observation(make_batch)
    for key, value in ((None, None), ("sampling_temperature", 0.5), ("num_steps", 2)):
        for policy in (plain, graphed) if key else ():
            setattr(policy.config, key, value)
        assert_same(graphed.sample_actions_with(seen, None, noise()), plain.sample_actions_with(seen, None, noise()))
    assert graphed.graphed._recorded._capture.recordings == 3


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"cuda_graphs must be false on cpu, got true: .*give a GPU as device, or leave cuda_graphs out"),
        ({"fast_forward": False}, r"cuda_graphs needs fast_forward=true, got false"),
        ({"adapter_instructions": [[[9]], [[10]]]}, r"cuda_graphs must be false with adapter_instructions, got true"),
    ],
)
def test_where_there_are_no_graphs_they_are_refused_in_words(make_policy, settings, message):
    policy = make_policy(**settings)
    with pytest.raises(ValueError, match=message):
        use_cuda_graphs(policy)
    assert policy.graphed is None


def test_a_policy_that_moves_to_where_there_are_none_is_refused(make_policy, make_batch):
    policy = make_policy().eval()
    captures = iter([StandIn, graphed_query.CudaCapture])
    use_cuda_graphs(policy, lambda device: next(captures)(device))
    policy.sample_actions_with(observation(make_batch), None, noise())
    policy.compute_in(torch.bfloat16)
    with pytest.raises(ValueError, match="cuda_graphs must be false on cpu"):
        policy.sample_actions_with(observation(make_batch), None, noise())


@pytest.mark.parametrize("configured", [False, True])
def test_real_time_chunking_is_refused_with_graphs(make_policy, make_batch, configured):
    policy = make_policy(rtc_config=RTCConfig(enabled=True) if configured else None).eval()
    use_cuda_graphs(policy, StandIn)
    plan = {} if configured else {"prev_chunk_left_over": torch.zeros(2, 1, ACTION_DIM), "inference_delay": 1}
    with pytest.raises(ValueError, match="cuda_graphs must be false with real-time chunking, got true"):
        policy.sample_actions_with(observation(make_batch), None, noise(), **plan)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@needs_a_gpu
@every_variant
def test_recorded_on_a_gpu_an_episode_is_the_one_without_to_the_bit(make_policy, make_batch, variant):
    plain, graphed = (make_policy(**VARIANTS[variant]).eval().to("cuda") for _ in range(2))
    use_cuda_graphs(graphed)
    memories: list[MemoryState | None] = [None, None]
    for step in range(5):
        seen = observation(make_batch, rows=2 if step < 3 else 1, seed=step % 2, step=step)
        seen = {name: tensor.to("cuda") for name, tensor in seen.items()}
        drawn = noise(len(seen["observation.state"]), seed=step).to("cuda")
        if step == 3:
            memories = [memory and memory.select([0]) for memory in memories]
        answers = [
            policy.sample_actions_with(seen, memory, drawn)
            for policy, memory in zip((plain, graphed), memories, strict=True)
        ]
        assert_same(answers[1], answers[0])
        memories = [memory for _, memory in answers]


@needs_a_gpu
def test_on_a_gpu_weights_that_moved_are_recorded_anew(make_policy, make_batch):
    plain, graphed = (make_policy().eval().to("cuda") for _ in range(2))
    use_cuda_graphs(graphed)
    seen = {name: tensor.to("cuda") for name, tensor in observation(make_batch).items()}
    drawn = noise().to("cuda")
    for change in (lambda policy: None, lambda policy: policy.compute_in(torch.bfloat16)):
        for policy in (plain, graphed):
            change(policy)
        assert_same(graphed.sample_actions_with(seen, None, drawn), plain.sample_actions_with(seen, None, drawn))
