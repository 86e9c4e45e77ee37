"""What four finished stages leave: shares, weights, validations, normalization, best checkpoints, cards."""

import json

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from stages import records, weights

from kuavo_train.config import RunConfig
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage.findings import Findings
from kuavo_train.stage.lineage import Start
from kuavo_train.stage.setup import open_stage


def test_each_stage_replays_what_its_shares_say(four_stages: list[RunConfig]) -> None:
    for config in four_stages:
        audit = json.loads((stage_folder(config).path / "replay_audit.json").read_text())
        assert audit["declared"] == config.stage.replay
        assert audit["total_frames"] == 20
        assert audit["held_out_frames_drawn"] == 0
        for name, share in config.stage.replay.items():
            assert abs(audit["drawn"][name]["frames"] - share * 20) < 2  # a clip of two queries


def test_each_stage_starts_from_the_one_before(four_stages: list[RunConfig]) -> None:
    for config in four_stages[1:]:
        stage = open_stage(
            config,
            [each.stage for each in four_stages],
            Start(before=stage_folder(four_stages[config.stage.index - 2]).checkpoints.at("best")),
            Accelerator(cpu=True),
            Findings(),
        )
        began = {name: value for name, value in stage.built.policy.state_dict().items() if "memory" in name}
        before = weights(stage_folder(four_stages[config.stage.index - 2]), "best")
        assert began
        for name, value in began.items():
            assert torch.equal(value, before[name])


def test_frozen_groups_are_unchanged_and_trained_ones_are_not(four_stages: list[RunConfig]) -> None:
    first, later = (weights(stage_folder(config), "best") for config in four_stages[:2])
    groups = json.loads((stage_folder(four_stages[1]).path / "parameters.json").read_text())["groups"]
    by_name = {row["group"]: row for row in groups}
    for group in ("vision", "connector", "vlm_text", "action_proj"):  # the last is none of SmolVLA's own switches
        assert by_name[group]["trainable"] is False
        assert by_name[group]["fingerprint_before"] == by_name[group]["fingerprint_after"]
    for group in ("expert", "state_proj", "memory"):
        assert by_name[group]["changed"] is True
    vision = [name for name in first if "vision_model" in name]
    assert vision
    assert all(torch.equal(first[name], later[name]) for name in vision)
    assert any(not torch.equal(first[name], later[name]) for name in first)


def test_every_task_is_validated_on_the_same_questions_at_every_stage(four_stages: list[RunConfig]) -> None:
    start = records(stage_folder(four_stages[0]), "start")
    assert [record["task"] for record in start] == [config.stage.name for config in four_stages]
    episodes = {r["task"]: [(e["episode"], e["frames"]) for e in r["episodes"]] for r in start}
    for place, config in enumerate(four_stages):
        folder = stage_folder(config)
        end = records(folder, "end")
        assert len(end) == 4
        assert [record["seen"] for record in end] == [number <= place for number in range(4)]
        for record in end:
            assert [(e["episode"], e["frames"]) for e in record["episodes"]] == episodes[record["task"]]
        assert {record["task"] for record in records(folder, "epoch")} == {
            each.stage.name for each in four_stages[: place + 1]
        }
    for group in ("base_position", "base_yaw", "base_mode"):
        assert end[0]["action_error_by_group"][group] is None
        assert end[3]["action_error_by_group"][group] > 0


def test_all_stages_share_one_normalization(four_stages: list[RunConfig]) -> None:
    hashes = {stage_folder(config).checkpoints.at("best").manifest["normalization"] for config in four_stages}
    run_file = json.loads((four_stages[0].run_folder / "run.json").read_text())
    assert hashes == {run_file["normalization"]["hash"]}
    stored = [
        load_file(
            next((stage_folder(config).path / "checkpoints/best/pretrained_model").glob("*unnormalizer*.safetensors"))
        )
        for config in four_stages
    ]
    for other in stored[1:]:
        assert all(torch.equal(stored[0][name], other[name]) for name in stored[0])


def test_the_best_checkpoint_has_the_least_mean_loss_over_all_tasks_seen(four_stages: list[RunConfig]) -> None:
    folder = stage_folder(four_stages[2])
    means: dict[int, list[float]] = {}
    for record in records(folder, "epoch"):
        means.setdefault(record["step"], []).append(record["loss"])
    best = min(means, key=lambda step: sum(means[step]) / len(means[step]))
    assert folder.about["best"]["step"] == best == folder.checkpoints.at("best").step
    end = {record["task"]: record["loss"] for record in records(folder, "end")}
    during = {record["task"]: record["loss"] for record in records(folder, "epoch") if record["step"] == best}
    assert {task: end[task] for task in during} == pytest.approx(during)


def test_the_result_of_every_stage_has_a_model_card(four_stages: list[RunConfig]) -> None:
    for place, config in enumerate(four_stages):
        folder = stage_folder(config)
        result = folder.checkpoints.at("best")
        result.verify()
        _, header, text = (result.pretrained_model / "README.md").read_text().split("---\n", 2)
        header = yaml.safe_load(header)
        assert (header["license"], header["library_name"]) == ("apache-2.0", "lerobot")
        assert "smolvla_memory" in header["tags"]
        assert f"The last stage: {folder.about['steps']} steps" in text
        losses = {record["task"]: record["loss"] for record in records(folder, "end")}
        for number, other in enumerate(four_stages):
            name, learnt = other.stage.name, number <= place
            assert (f"| {name} | {losses[name]:.4f} |" in text) == learnt
            assert (f"- **{name}**: {' '.join(other.stage.instruction.split())}" in text) == learnt
