"""Training pictures change at random, but one clip in one way, and the same way whenever it is trained again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.transforms import functional as torchvision

from kuavo_train.compose import compose_run
from kuavo_train.config import CONFIG_FOLDER, AugmentationConfig, ConfigError
from kuavo_train.data.augmentation import ClipAugmentation, augment
from kuavo_train.run_folder import stage_folder
from kuavo_train.stage import run_stage

CAMERAS = ["observation.images.head_cam_h", "observation.images.wrist_cam_l"]
ALL = AugmentationConfig(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, shift=0.1, crop=0.1)
QUERIES = 4


def batch(lanes: int = 3) -> dict[str, Any]:
    """Every row of a camera shows the same picture, so that rows differ by their change alone."""
    picture = torch.rand((1, 3, 16, 20), generator=torch.Generator().manual_seed(0))
    pictures = {camera: picture.repeat(lanes * QUERIES, 1, 1, 1) for camera in CAMERAS}
    return {**pictures, "action": torch.ones(lanes * QUERIES, 2)}


def clips(config: AugmentationConfig = ALL, **changes: int) -> ClipAugmentation:
    return ClipAugmentation(
        config, cameras=CAMERAS, **{"queries": QUERIES, "seed": 0, "stage": 2, "process": 0} | changes
    )


def drawn(**values: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "right", "down", "crop")
    return torch.tensor([[values.get(name, 0.0) for name in names]])


def test_it_is_off_in_every_profile() -> None:
    for profile in (CONFIG_FOLDER / "profile").glob("*.yaml"):
        assert all(config.data.augmentation is None for config in compose_run([f"profile={profile.stem}"]))


def test_all_queries_of_a_lane_change_alike_and_lanes_and_cameras_differ() -> None:
    changed = clips()(batch(), 5, 0)
    by_lane = {camera: changed[camera].view(3, QUERIES, 3, 16, 20) for camera in CAMERAS}
    for lanes in by_lane.values():
        assert torch.equal(lanes, lanes[:, :1].expand_as(lanes))
        assert not torch.allclose(lanes[0], lanes[1], atol=1e-2)
    assert not torch.allclose(by_lane[CAMERAS[0]], by_lane[CAMERAS[1]], atol=1e-2)
    assert torch.equal(changed["action"], batch()["action"])


def test_the_change_is_a_function_of_seed_stage_process_step_batch_and_lane_alone() -> None:
    first = clips()(batch(), 5, 0)[CAMERAS[0]]
    torch.manual_seed(1)
    again = clips()
    again(batch(), 4, 0)
    assert torch.equal(first, again(batch(), 5, 0)[CAMERAS[0]])
    assert torch.equal(first[: 2 * QUERIES], clips()(batch(lanes=2), 5, 0)[CAMERAS[0]])
    others = [clips()(batch(), 6, 0), clips()(batch(), 5, 1)]
    others += [clips(**{key: 1})(batch(), 5, 0) for key in ("seed", "stage", "process")]
    assert not any(torch.allclose(first, other[CAMERAS[0]], atol=1e-3) for other in others)


def test_pictures_stay_pictures() -> None:
    changed = clips(AugmentationConfig(1, 1, 1, 0.5, 0.5, 0.9))(batch(), 0, 0)
    for camera in CAMERAS:
        assert changed[camera].shape == batch()[camera].shape
        assert changed[camera].dtype == torch.float32
        assert 0 <= changed[camera].min() <= changed[camera].max() <= 1
    unchanged = clips(AugmentationConfig())(batch(), 0, 0)
    torch.testing.assert_close(unchanged[CAMERAS[0]], batch()[CAMERAS[0]])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("amount", [-0.2, 0.25])
def test_colours_change_as_torchvisions(name: str, amount: float) -> None:
    pictures = 0.3 + 0.4 * batch()[CAMERAS[0]][:1]  # away from the limits, at which torchvision clips in between
    ours = augment(pictures, drawn(**{name: amount}), AugmentationConfig(brightness=1, contrast=1, saturation=1))
    torch.testing.assert_close(ours, getattr(torchvision, f"adjust_{name}")(pictures, 1 + amount), atol=2e-3, rtol=0)


def test_hue_turns_colours_and_leaves_grey_and_brightness() -> None:
    config = AugmentationConfig(hue=0.5)
    grey = torch.full((1, 3, 4, 4), 0.4)
    torch.testing.assert_close(augment(grey, drawn(hue=0.7), config), grey)
    red = torch.tensor([0.7, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    turned = augment(red, drawn(hue=0.5), config)
    torch.testing.assert_close(
        torchvision.rgb_to_grayscale(turned), torchvision.rgb_to_grayscale(red), atol=1e-3, rtol=0
    )
    assert turned[0, 0].mean() < red[0, 0].mean()
    torch.testing.assert_close(augment(red, drawn(hue=1), config), augment(red, drawn(hue=-1), config))


def test_a_shift_moves_the_picture_and_goes_on_with_its_edge() -> None:
    pictures = batch()[CAMERAS[0]][:1]
    moved = augment(pictures, drawn(right=0.2, down=-0.25), AugmentationConfig(shift=1.0 / 2))
    right, up = 2, 2  # of 20 and 16 pixels
    torch.testing.assert_close(moved[:, :, :-up, right:], pictures[:, :, up:, :-right])
    torch.testing.assert_close(moved[:, :, 0, 0], pictures[:, :, up, 0])


def test_a_crop_shows_the_middle_larger() -> None:
    pictures = torch.zeros(1, 3, 16, 16)
    pictures[:, :, 4:12, 4:12] = 1
    cropped = augment(pictures, drawn(crop=-1), AugmentationConfig(crop=0.5))
    assert cropped[:, :, 1:-1, 1:-1].min() == 1  # the outermost pixels mix with what lies beyond


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{brightness: 2}", r"data.augmentation.brightness must be in \[0, 1\], got 2"),
        ("{hue: 0.6}", r"data.augmentation.hue must be in \[0, 0.5\], got 0.6"),
        ("{crop: 1}", r"data.augmentation.crop must be in \[0, 1\), got 1"),
        ("{blur: 1}", r"data.augmentation: .*blur"),
        ("{shift: far}", r"data.augmentation: .*far"),
    ],
)
def test_an_augmentation_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run([f"data.augmentation={override}"])


def test_a_stage_changes_the_pictures_it_trains_on_and_not_those_it_is_validated_on(
    small_run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    seen: list[dict[str, Any]] = []
    call = ClipAugmentation.__call__

    def remember(self: ClipAugmentation, batch: dict[str, Any], step: int, number: int) -> dict[str, Any]:
        seen.append({"batch": batch, "key": (self.key, self.queries, step, number)})
        return call(self, batch, step, number)

    monkeypatch.setattr(ClipAugmentation, "__call__", remember)
    overrides = ["training.gradient_accumulation_steps=2", "training.max_steps=2", "policy.mem_backprop_depth=2"]
    runs = []
    for augmentation in ("null", "{brightness: 0.5, shift: 0.2}"):
        configs = compose_run(
            [*small_run(*overrides), f"data.augmentation={augmentation}", f"run=run_{augmentation[1:4]}"]
        )
        assert run_stage(configs[0], [config.stage for config in configs]) == 0
        folder = stage_folder(configs[0])
        start = [record["loss"] for record in folder.validations.read() if record["kind"] == "start"]
        runs.append((start, folder.metrics.read()[0]["loss"]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] != runs[1][1]
    assert [entry["key"][1:] for entry in seen] == [(2, step, number) for step in (0, 1) for number in (0, 1)]
    for entry in seen:
        pictures = entry["batch"]["observation.images.head_cam_h"]
        assert pictures.dtype == torch.float32
        assert 0 <= pictures.min() <= pictures.max() <= 1
