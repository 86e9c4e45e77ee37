"""Training pictures change at random, but one clip in one way, and the same way whenever it is trained again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lerobot.transforms.transforms import ImageTransforms

from kuavo_train.compose import compose_run
from kuavo_train.config import CONFIG_FOLDER, AugmentationConfig
from kuavo_train.data.batch import Batch, Origin
from kuavo_train.data.images.augmentation import ClipAugmentation
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.stage import run_stage

CAMERAS = ["observation.images.head_cam_h", "observation.images.wrist_cam_l"]
BRIGHTNESS = AugmentationConfig(tfs={"light": {"type": "ColorJitter", "kwargs": {"brightness": [0.5, 1.5]}}})
QUERIES = 4


def batch(lanes: int = 3, *, frames: tuple[int, ...] = ()) -> Batch:
    """Every row of a camera shows the same picture, so that rows differ by their change alone."""
    picture = torch.rand((1, 3, 16, 20), generator=torch.Generator().manual_seed(0))
    pictures = {camera: picture.expand(lanes * QUERIES, *frames, 3, 16, 20).clone() for camera in CAMERAS}
    inputs = {**pictures, "action": torch.ones(lanes * QUERIES, 2)}
    return Batch(inputs, ["x"] * lanes * QUERIES, Origin(*[torch.zeros(lanes * QUERIES)] * 4), QUERIES)


def clips(config: AugmentationConfig = BRIGHTNESS, **changes: int) -> ClipAugmentation:
    return ClipAugmentation(config, cameras=CAMERAS, **{"seed": 0, "stage": 2, "process": 0} | changes)


def test_it_is_off_in_every_profile() -> None:
    for profile in (CONFIG_FOLDER / "profile").glob("*.yaml"):
        assert all(config.data.augmentation is None for config in compose_run([f"profile={profile.stem}"]))


def test_it_is_lerobots_with_lerobots_defaults() -> None:
    (config, *_) = compose_run(["data.augmentation={}"])
    assert config.data.augmentation is not None
    transforms = clips(config.data.augmentation).transforms
    assert isinstance(transforms, ImageTransforms)
    assert list(transforms.transforms) == ["brightness", "contrast", "saturation", "hue", "sharpness", "affine"]
    assert transforms.tf.n_subset == 3


@pytest.mark.parametrize("frames", [(), (2,)])
def test_all_queries_of_a_lane_change_alike_and_lanes_and_cameras_differ(frames: tuple[int, ...]) -> None:
    changed = clips()(batch(frames=frames), 5, 0).inputs
    by_lane = {camera: changed[camera].unflatten(0, (3, QUERIES)) for camera in CAMERAS}
    for lanes in by_lane.values():
        assert torch.equal(lanes, lanes[:, :1].expand_as(lanes))
        assert not torch.allclose(lanes[0], lanes[1], atol=1e-2)
    assert not torch.allclose(by_lane[CAMERAS[0]], by_lane[CAMERAS[1]], atol=1e-2)
    assert torch.equal(changed["action"], batch().inputs["action"])


def test_the_change_is_a_function_of_seed_stage_process_step_batch_and_lane_alone() -> None:
    first = clips()(batch(), 5, 0).inputs[CAMERAS[0]]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = clips()
    again(batch(), 4, 0)
    assert torch.equal(first, again(batch(), 5, 0).inputs[CAMERAS[0]])
    assert torch.equal(torch.get_rng_state(), before)  # what the policy draws is not touched
    assert torch.equal(first[: 2 * QUERIES], clips()(batch(lanes=2), 5, 0).inputs[CAMERAS[0]])
    others = [clips()(batch(), 6, 0), clips()(batch(), 5, 1)]
    others += [clips(**{key: 1})(batch(), 5, 0) for key in ("seed", "stage", "process")]
    assert not any(torch.allclose(first, other.inputs[CAMERAS[0]], atol=1e-3) for other in others)


def test_pictures_stay_pictures() -> None:
    changed = clips(AugmentationConfig(max_num_transforms=6))(batch(), 0, 0).inputs
    for camera in CAMERAS:
        assert changed[camera].shape == batch().inputs[camera].shape
        assert changed[camera].dtype == torch.float32
        assert 0 <= changed[camera].min() <= changed[camera].max() <= 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{max_num_transforms: 0}", r"data.augmentation.max_num_transforms must be at least 1 .*, got 0"),
        ("{brightness: 0.2}", r"data.augmentation.brightness must be a key of the configuration"),
        ("{max_num_transforms: many}", r"data.augmentation.max_num_transforms must be a whole number, got 'many'"),
    ],
)
def test_an_augmentation_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([f"data.augmentation={override}"])


def test_a_transform_that_lerobot_does_not_have_is_told_before_training(small_run: Callable[..., list[str]]) -> None:
    configs = compose_run(small_run("data.augmentation={tfs: {fog: {type: Fog}}}"))
    (problem,) = examine_stage(configs[0], [config.stage for config in configs]).problems
    assert "data.augmentation.tfs must be LeRobot's image transforms" in problem
    assert "Fog" in problem


def test_a_stage_changes_the_pictures_it_trains_on_and_not_those_it_is_validated_on(
    small_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    seen: list[tuple[Batch, int, int]] = []
    call = ClipAugmentation.__call__

    def remember(self: ClipAugmentation, batch: Batch, step: int, number: int) -> Batch:
        seen.append((batch, step, number))
        return call(self, batch, step, number)

    monkeypatch.setattr(ClipAugmentation, "__call__", remember)
    overrides = ["training.gradient_accumulation_steps=2", "training.max_steps=2", "policy.mem_backprop_depth=2"]
    runs = []
    for augmentation in ("null", "{}"):
        configs = compose_run([*small_run(*overrides), f"data.augmentation={augmentation}", f"run=run_{len(runs)}"])
        assert run_stage(configs[0], [config.stage for config in configs]) == 0
        folder = stage_folder(configs[0])
        start = [record["loss"] for record in folder.validations.read() if record["kind"] == "start"]
        runs.append((start, folder.metrics.read()[0]["loss"]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] != runs[1][1]
    asked = [(batch.clip, step, number) for batch, step, number in seen]
    assert asked == [(2, step, number) for step in (0, 1) for number in (0, 1)]
    for trained, _, _ in seen:
        pictures = trained.inputs["observation.images.head_cam_h"]
        assert pictures.dtype == torch.float32
        assert 0 <= pictures.min() <= pictures.max() <= 1
