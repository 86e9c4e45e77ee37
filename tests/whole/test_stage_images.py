"""A stage with a frozen encoder learns from stored embeddings what it would learn from pictures."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from stages import changed

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.data.batch import preprocess
from kuavo_train.data.dataset import MixedDataset
from kuavo_train.data.images import plan
from kuavo_train.data.images.features import CachedFeatures
from kuavo_train.data.images.frames import CachedFrames
from kuavo_train.data.sampler import Draw
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import StageFolder, stage_folder
from kuavo_train.stage.description import describe
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import OpenedStage, open_stage
from kuavo_train.stage.stage import run_stage
from kuavo_train.training.frozen_encoder import frozen_context, frozen_encoder
from lerobot_policy_smolvla_memory.backbone import FastForward
from lerobot_policy_smolvla_memory.configuration_smolvla_memory import ENCODED_CONTEXT
from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy

Embedded = Callable[..., list[RunConfig]]


@pytest.fixture(scope="module")
def embedded_in(small_run_in: Callable[..., list[str]]) -> Embedded:
    """The embedded profile from nothing, but for its sizes as it is, in a folder of its own; composed once."""
    sizes = [item for item in small_run_in(Path("outputs")) if not item.startswith("profile=")]
    given = ["learn=null", "policy.mem_backprop_depth=4", "validation.draws=1", "allow_random_frozen_vlm=true"]
    composed = compose_run(["profile=embedded", "base=none", *sizes, *given])

    def configs(folder: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> list[RunConfig]:
        here = {"outputs": str(folder), "data": {"cache_root": str(folder), **(data or {})}}
        return [changed(config, **here, **changes) for config in composed]

    return configs


@pytest.fixture
def embedded(embedded_in: Embedded, tmp_path: Path) -> Embedded:
    return partial(embedded_in, tmp_path)


@pytest.fixture(scope="module")
def begun(embedded_in: Embedded, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run with its first stage done, in which nothing is frozen and no embedding computed."""
    configs = embedded_in(tmp_path_factory.mktemp("begun"), policy={"mem_backprop_depth": 2})
    run(configs, 0)
    return configs


def continued(first: list[RunConfig], folder: Path, **data: Any) -> list[RunConfig]:
    """A run of its own that begins with the first stage of another, and with nothing in its caches."""
    shutil.copytree(first[0].run_folder, folder / first[0].run, symlinks=True)
    data["cache_root"] = str(folder)
    return [replace(config, outputs=str(folder), data=replace(config.data, **data)) for config in first]


def opened(configs: list[RunConfig], place: int = 1) -> OpenedStage:
    curriculum = [config.stage for config in configs]
    return open_stage(configs[place], curriculum, Start(), Accelerator(cpu=True), Findings())


def run(configs: list[RunConfig], place: int) -> None:
    assert run_stage(configs[place], [config.stage for config in configs]) == 0


def losses(folder: StageFolder) -> list[float]:
    return [record["loss"] for record in folder.validations.read()] + [
        record["loss"] for record in folder.metrics.read()
    ]


def weights(folder: StageFolder) -> torch.Tensor:
    """All in one vector, of the stage's last step."""
    stored = load_file(folder.path / "checkpoints/last/pretrained_model/model.safetensors")
    return torch.cat([stored[name].flatten() for name in sorted(stored)])


class EmbedCalls(list):
    """How many pictures `embed_camera` was asked for, call by call; blank ones are there for shape and number alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        embed = SmolVLAMemoryPolicy.embed_camera

        def counted(policy: SmolVLAMemoryPolicy, pictures: torch.Tensor) -> torch.Tensor:
            self.append(int(pictures.flatten(1).any(dim=1).sum()))
            return embed(policy, pictures)

        monkeypatch.setattr(SmolVLAMemoryPolicy, "embed_camera", counted)


def test_the_embedded_profile_uses_features_as_soon_as_it_freezes_the_encoder(embedded: Embedded) -> None:
    configs = embedded()
    kinds = [type(source) for source in opened(configs, 0).images.sources.values()]
    assert kinds == [CachedFrames] * 4
    for place in (1, 2, 3):
        stage = opened(configs, place)
        assert [type(source) for source in stage.images.sources.values()] == [CachedFeatures] * 4
        assert "embeddings by the frozen encoder" in describe(stage.findings)


def test_an_encoder_that_is_frozen_from_the_first_stage_on_serves_it_from_features(embedded: Embedded) -> None:
    stage = opened(embedded(training={"freeze_first_stage": ["vision", "connector", "vlm_text"]}), 0)
    assert [type(source) for source in stage.images.sources.values()] == [CachedFeatures] * 4


@pytest.mark.parametrize("trained", ["vision", "connector"])
def test_a_stage_that_trains_a_part_of_the_encoder_uses_frames(embedded: Embedded, trained: str) -> None:
    frozen = {"vision": "connector", "connector": "vision"}[trained]
    stage = opened(embedded(training={"freeze": [frozen]}))
    assert all(isinstance(source, CachedFrames) for source in stage.images.sources.values())
    assert "no embeddings: the image encoder is trained" in describe(stage.findings)


def test_the_loss_from_features_is_that_from_pictures(embedded: Embedded) -> None:
    relative = []
    batches: list[dict[str, Any]] = []
    for cached in (True, False):
        stage = opened(embedded(data={"feature_cache": cached}))
        stage.images.fill(progress=False)
        dataset = stage.dataset(stage.tasks)
        draws = [Draw(place, row) for place in range(4) for row in (0, 20, 41, 69)]
        draws = [draw for draw in draws if stage.tasks[draw.task].episode[draw.row] in _read(stage, draw.task)]
        batches.append(preprocess(dataset.fetch(draws), stage.built.preprocessor, torch.device("cpu")))
    policy = stage.built.policy.eval()
    features, pictures = batches
    assert not any(key.startswith("observation.images.") for key in features)
    assert not any(key.startswith("observation.image_features.") for key in pictures)
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        size = len(features["action"])
        given = {"noise": torch.randn((size, 6, 32), generator=random), "time": torch.rand(size, generator=random)}
        with torch.no_grad():
            loss, reference = (policy.forward(batch, **given)[0].item() for batch in (features, pictures))
            wrong = {key: -value if "image_features" in key else value for key, value in features.items()}
            other = policy.forward(wrong, **given)[0].item()
        relative.append(abs(loss / reference - 1))
        assert abs(other / reference - 1) > 10 * relative[-1]  # pictures do count
    assert max(relative) < 1e-3


def _read(stage: OpenedStage, place: int) -> list[int]:
    task = stage.tasks[place]
    trained = task.train_episodes if task.name in stage.config.stage.replay else ()
    return [*trained, *task.held_out_episodes]


def test_training_from_features_is_training_from_pictures(
    begun: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = EmbedCalls(monkeypatch)
    with_features = continued(begun, tmp_path / "features")
    run(with_features, 1)
    assert sum(calls) > 500
    with_pictures = continued(begun, tmp_path / "pictures", feature_cache=False)
    calls.clear()
    run(with_pictures, 1)
    assert calls == []
    one, other = (stage_folder(configs[1]) for configs in (with_features, with_pictures))
    assert losses(one) == pytest.approx(losses(other), rel=2e-3)
    assert losses(one) != losses(other)
    start, end, other_end = (weights(folder) for folder in (stage_folder(with_features[0]), one, other))
    assert (end - other_end).norm() < 0.02 * (end - start).norm()
    audits = [json.loads((folder.path / "replay_audit.json").read_text()) for folder in (one, other)]
    assert audits[0] == audits[1]


def test_a_later_stage_computes_only_the_episodes_it_reads_for_the_first_time(
    begun: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = continued(begun, tmp_path)
    calls = EmbedCalls(monkeypatch)
    for place, frames in ((1, 2 * 70 + 2 * 28), (2, 42), (3, 42)):  # then: what was held out is there already
        calls.clear()
        run(configs, place)
        assert sum(calls) == 3 * frames
    before = Start(before=stage_folder(configs[2]).checkpoints.at("best"))
    again = replace(configs[3], run="again")
    stage = open_stage(again, [config.stage for config in configs], before, Accelerator(cpu=True), Findings())
    calls.clear()
    stage.images.fill(progress=False)
    assert calls == []


def test_the_key_changes_with_the_encoder_and_with_nothing_else_of_the_policy(embedded: Embedded) -> None:
    policy = opened(embedded()).built.policy

    def settings(precision: str = "no") -> dict[str, Any]:
        encoder = frozen_encoder(policy, precision=precision, autocast=nullcontext)
        assert encoder is not None
        return dict(encoder.settings)

    first, parameters = settings(), dict(policy.named_parameters())
    assert settings("bf16") != first
    for group, names in policy.parameter_groups().items():
        before, values = settings(), parameters[names[-1]].data
        values.view(-1)[0] += 1e-3
        assert (settings() != before) == (group in ("vision", "connector")), group
    before = settings()
    policy.config.resize_imgs_with_padding = (48, 48)
    assert settings() != before


def test_a_cpu_is_shown_large_pictures_one_by_one_so_that_a_small_batch_embeds_no_blank_ones(
    embedded: Embedded,
) -> None:
    policy, together = opened(embedded()).built.policy, []
    for size in ((64, 64), (512, 512)):
        policy.config.resize_imgs_with_padding = size
        encoder = frozen_encoder(policy, precision="no", autocast=nullcontext)
        assert encoder is not None
        together.append(encoder.together)
    assert together == [8, 1]


def test_a_disk_that_cannot_hold_the_features_is_refused_in_preflight(
    embedded: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    configs = embedded()
    with pytest.raises(ConfigError, match=r"data.feature_cache needs [\d.]+ MiB below .*, 2.0 KiB are free"):
        opened(configs)
    assert not stage_folder(configs[1]).path.exists()


FROZEN = {"freeze": ["vision", "connector", "vlm_text"], "freeze_first_stage": ["vision", "connector", "vlm_text"]}


def test_a_frozen_model_is_read_from_its_keys_and_values_and_a_learning_one_is_not(embedded: Embedded) -> None:
    stage = opened(embedded(training=FROZEN), 0)
    assert list(stage.images.contexts) == [task.name for task in stage.tasks]
    assert "keys and values of the frozen model: " in describe(stage.findings)
    for changes in (
        {"training": {**FROZEN, "freeze": ["vision", "connector"]}},
        {"training": FROZEN, "data": {"feature_cache": False}},
        {"training": FROZEN, "policy": {"mem_at_start": True}},
        {"training": FROZEN, "policy": {"fast_forward": False}},
    ):
        stage = opened(embedded(**changes))
        assert not stage.images.contexts, changes
        assert "keys and values" not in describe(stage.findings), changes
    stage = opened(embedded(training=FROZEN, data={"feature_fill": "along"}))
    assert not stage.images.contexts
    assert "keys and values: not kept, data.feature_fill=along embeds frame by frame" in describe(stage.findings)
    stage = opened(embedded(training=FROZEN, data={"context_cache_limit_gib": 1e-4}))
    assert not stage.images.contexts
    assert re.search(
        r"keys and values: not kept, they would take [\d.]+ MiB, over data.context_cache_limit_gib=0.0001",
        describe(stage.findings),
    )


def test_the_loss_from_keys_and_values_is_that_from_embeddings(embedded: Embedded) -> None:
    stage = opened(embedded(training=FROZEN))
    stage.images.fill(progress=False)
    draws = [Draw(place, row) for place in (0, 3) for row in stage.tasks[place].rows_of(_read(stage, place))[:5]]
    fetched = [  # with the rows of the task of fewer words alone, and beside the longer one
        stage.dataset(stage.tasks).fetch(draws),
        stage.dataset(stage.tasks).fetch(draws[5:]),
    ]
    both, alone = (preprocess(batch, stage.built.preprocessor, torch.device("cpu")) for batch in fetched)
    assert both[ENCODED_CONTEXT].shape[3] > alone[ENCODED_CONTEXT].shape[3]
    policy, random = stage.built.policy.eval(), torch.Generator().manual_seed(0)
    given = {"noise": torch.randn((10, 6, 32), generator=random), "time": torch.rand(10, generator=random)}
    of_alone = {name: value[5:] for name, value in given.items()}

    def losses(batch: dict[str, Any], given: dict[str, torch.Tensor], factor: float | None) -> torch.Tensor:
        batch = dict(batch)
        encoded = batch.pop(ENCODED_CONTEXT)
        if factor is not None:
            batch[ENCODED_CONTEXT] = factor * encoded
        with torch.no_grad():
            return policy.forward(batch, **given, reduction="none")[0]

    reference = losses(both, given, None)
    assert torch.allclose(losses(both, given, 1), reference, rtol=2e-3)
    assert torch.allclose(losses(alone, of_alone, 1), reference[5:], rtol=2e-3)
    assert not torch.allclose(losses(both, given, -1), reference, rtol=2e-2)


def test_training_from_keys_and_values_never_shows_the_model_a_picture_again(
    embedded_in: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[int] = []
    append = FastForward.append

    def counted(forward: FastForward, tokens: torch.Tensor, bias: torch.Tensor, before: Any = None, **how: Any) -> Any:
        contexts.extend([len(tokens)] if before is None else [])
        return append(forward, tokens, bias, before, **how)

    monkeypatch.setattr(FastForward, "append", counted)
    kept = embedded_in(tmp_path / "kept", training=FROZEN)
    anew = embedded_in(tmp_path / "anew", training=FROZEN, data={"context_cache_limit_gib": 0})
    run(kept, 0)
    tasks, episodes = 4, 3 + 4 * 2  # one is trained on, and of each two are held out
    assert sum(contexts) == 14 * episodes + tasks  # each frame once, and each instruction, to know how long it is
    contexts.clear()
    run(anew, 0)
    assert contexts
    one, other = (stage_folder(configs[0]) for configs in (kept, anew))
    assert losses(one) == pytest.approx(losses(other), rel=2e-3)
    assert losses(one) != losses(other)


def test_embeddings_kept_as_int8_cost_less_than_a_thousandth_of_the_held_out_loss(
    embedded_in: Embedded, tmp_path: Path
) -> None:
    found = []
    for dtype in ("bfloat16", "int8"):
        configs = embedded_in(tmp_path / dtype, training=FROZEN, data={"feature_dtype": dtype})
        run(configs, 0)
        found.append([record["loss"] for record in stage_folder(configs[0]).validations.read()])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[1] != found[0]


def test_with_a_feature_stride_nothing_but_every_nth_frame_is_embedded_trained_on_replayed_or_validated(
    embedded: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, gather, frames = EmbedCalls(monkeypatch), MixedDataset.gather, set[int]()

    def noted(dataset: MixedDataset, draws: Sequence[Draw], **how: Any) -> Any:
        frames.update(int(dataset.tasks[draw.task].frame[draw.row]) for draw in draws)
        return gather(dataset, draws, **how)

    monkeypatch.setattr(MixedDataset, "gather", noted)
    configs = embedded(training=FROZEN, data={"feature_stride": 2})
    run(configs, 0)
    episodes = 3 + 4 * 2  # one task is trained on, and of each two are held out
    assert sum(calls) == 3 * 7 * episodes
    run(configs, 1)
    assert frames == set(range(0, 14, 2))
    audit = json.loads((stage_folder(configs[1]).path / "replay_audit.json").read_text())
    moving_grasp = audit["drawn"]["moving_grasp"]["frames"]
    assert audit["passes"]["moving_grasp"] == moving_grasp / (3 * 7) > 0
    with pytest.raises(ConfigError, match=r"data.feature_stride \(was 2, is 1\)"):
        run([changed(config, data={"feature_stride": 1}) for config in configs], 2)


def test_keys_and_values_are_of_these_weights_and_these_words(embedded: Embedded) -> None:
    stage = opened(embedded(training=FROZEN))

    def caches(stage: OpenedStage) -> list[Path]:
        return [source.cache.path for source in stage.images.contexts.values()]

    assert caches(opened(embedded(training=FROZEN))) == caches(stage)
    policy = stage.built.policy
    for group, names in policy.parameter_groups().items():
        changed_weights = dict(policy.named_parameters())[names[-1]].data
        changed_weights.view(-1)[0] += 1e-3
        encoder = frozen_context(policy, stage.built.preprocessor, precision="no", autocast=nullcontext)
        assert encoder is not None
        found = stage.images.contexts["weighing"].cache.key["context"]["weights"]
        assert (encoder.settings["weights"] != found) == (group in ("vision", "connector", "vlm_text")), group
        changed_weights.view(-1)[0] -= 1e-3
    configs = embedded(training=FROZEN)
    configs = [replace(each, stage=replace(each.stage, instruction=f"do {each.stage.name}")) for each in configs]
    assert not set(caches(opened(configs))) & set(caches(stage))
