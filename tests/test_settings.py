"""Which settings a stage answers for, key by key."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from kuavo_train.compose import compose_run
from kuavo_train.config import RunConfig
from kuavo_train.runs.settings import FREE, MEASURED, SHARED, Difference, differences, shared_differences

DEFAULTS = {"num_mem_tokens": 0, "mem_growth": 1.05}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_run(["profile=smoke"])[1]


def found(was: dict[str, Any], now: RunConfig, *, finished: bool = True, first: bool = False) -> list[str]:
    return [str(each) for each in differences(was, now, policy_defaults=DEFAULTS, first=first, finished=finished)]


def test_every_key_that_differs_is_named_with_what_it_was_and_is(config: RunConfig) -> None:
    now = replace(
        config,
        seed=1,
        training=replace(config.training, lr=1e-3, betas=[0.8, 0.999]),
        policy={**config.policy, "num_mem_tokens": 8},
        stage=replace(config.stage, instruction="Weigh it", replay={"weighing": 1.0}),
        tiny_vlm=None,
    )
    assert found(asdict(config), config) == []
    assert [text.split(" (")[0] for text in found(asdict(config), now)] == [
        "seed",
        "stage.instruction",
        "stage.replay",
        "training.lr",
        "training.betas",
        "policy.num_mem_tokens",
        "tiny_vlm",
    ]
    assert "training.lr (was 0.0014, is 0.001)" in found(asdict(config), now)
    assert len(str(Difference("key", "x" * 1000, None))) < 300


def test_what_cannot_change_a_result_may_differ_and_what_is_measured_until_the_end(config: RunConfig) -> None:
    now = replace(
        config,
        outputs="/elsewhere",
        resume=True,
        processes=2,
        data=replace(config.data, root="/data", num_workers=4, frame_cache=False, feature_fill="along"),
        training=replace(config.training, log_every=7, device="auto", freeze_first_stage=["vision"]),
        rollout=replace(config.rollout, episodes=0, workers=1),
    )
    assert found(asdict(config), now, finished=False) == []
    assert found(asdict(config), now) == ["rollout.episodes (was 1, is 0)"]
    assert found(asdict(config), now, finished=False, first=True) == [
        "training.freeze_first_stage (was [], is ['vision'])"  # which later stages do not look at
    ]


def test_a_base_that_its_hash_names_may_lie_elsewhere(config: RunConfig) -> None:
    def starting(path: str, sha256: str | None) -> RunConfig:
        return replace(config, policy={**config.policy, "pretrained_path": path}, base_sha256=sha256)

    was = asdict(starting("/mine/base", "a" * 64))
    moved, other, unnamed = (starting("/yours/base", sha256) for sha256 in ("a" * 64, "b" * 64, None))
    assert found(was, moved) == shared_differences(was, moved, policy_defaults=DEFAULTS) == []
    path = "policy.pretrained_path (was /mine/base, is /yours/base)"
    assert path in found(was, other)
    assert path in found(asdict(starting("/mine/base", None)), unnamed)
    assert [str(each) for each in shared_differences(was, other, policy_defaults=DEFAULTS)] == [path]


def test_a_config_of_an_older_version_had_the_defaults_of_newer_keys(config: RunConfig) -> None:
    was = asdict(config)
    del was["rollout"], was["training"]["query_jitter"], was["policy"]["mem_growth"], was["dealt"]
    was["gone"] = was["training"]["gone"] = 1
    without = replace(config, rollout=type(config.rollout)(parallel=3))
    assert found(was, without) == []
    assert found(was, replace(without, policy={**config.policy, "mem_growth": 2.0})) == [
        "policy.mem_growth (was 1.05, is 2.0)"
    ]
    assert found(was, config) == ["rollout.episodes (was 0, is 1)", "rollout.max_steps (was null, is 12)"]


def test_stages_of_one_run_share_the_policy_but_not_the_recipe(config: RunConfig) -> None:
    other = replace(config, training=replace(config.training, lr=1.0), policy={**config.policy, "num_steps": 99})
    assert [each.key for each in shared_differences(asdict(config), other, policy_defaults={})] == ["policy.num_steps"]


def test_the_lists_name_keys_that_exist(config: RunConfig) -> None:
    schema = asdict(config)
    for key in (*FREE, *MEASURED, *SHARED):
        group, _, name = key.partition(".")
        assert group in schema, key
        assert not name or group == "policy" or name in schema[group], key
