"""What is kept of earlier tasks in one file: later stages learn from it what they would learn from the datasets."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stages import assert_equal_weights, changed, records, run, weights

from kuavo_train.config import RunConfig, SimulationConfig, StageConfig
from kuavo_train.data.replay.exported_file import FORMAT, exported_tasks
from kuavo_train.data.task import open_task
from kuavo_train.errors import ConfigError
from kuavo_train.runs.run_folder import stage_folder
from kuavo_train.stage import setup
from kuavo_train.stage.description import describe
from kuavo_train.stage.preflight import examine_stage
from kuavo_train.stage.replay_export import Exported, export_replay
from kuavo_train.stage.setup import record_missing_data

Configs = Callable[..., list[RunConfig]]
FILE = "kept.safetensors"


def placed(configs: list[RunConfig], folder: Path, **changes: Any) -> list[RunConfig]:
    """With datasets and outputs in `folder`."""
    data = folder / "data"
    return [
        changed(
            config,
            outputs=str(folder / "outputs"),
            stage={"root": str(data / config.stage.name)},
            data={"root": str(data)},
            **changes,
        )
        for config in configs
    ]


def stages(configs: list[RunConfig]) -> list[StageConfig]:
    return [config.stage for config in configs]


def exported(configs: list[RunConfig], place: int, folder: Path, **changes: Any) -> Exported:
    config = changed(configs[place], **changes)
    return export_replay(config, stages(configs), folder / FILE)


def forget(folder: Path, *names: str) -> None:
    """Delete the demonstrations of tasks, and all that was made of them."""
    for name in names:
        shutil.rmtree(folder / "data" / name)
        for path in (folder / "data" / ".cache").glob(f"*/{name}-*"):
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def learnt(small_configs_in: Configs, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunConfig]:
    """A run of three tasks of which the first is learnt: one of its three training episodes is kept, and exported."""
    folder = tmp_path_factory.mktemp("learnt")
    shutil.copytree(datasets, folder / "data")
    words = "learn=[moving_grasp,weighing,placement]"
    configs = placed(
        small_configs_in(folder / "outputs", words), folder, replay={"buffer": 0.3}, policy={"mem_backprop_depth": 2}
    )
    assert run(configs) == 0
    exported(configs, 1, folder)
    return configs


def copied(configs: list[RunConfig], folder: Path) -> list[RunConfig]:
    shutil.copytree(Path(configs[0].outputs).parent, folder, symlinks=True, dirs_exist_ok=True)
    return placed(configs, folder)


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def from_file(folder: Path) -> dict[str, Any]:
    return {"data": {"replay_file": str(folder / FILE)}}


@pytest.mark.parametrize("frozen", [("vision", "connector"), ("vision", "connector", "vlm_text")])
def test_with_the_demonstrations_deleted_a_stage_ends_in_the_weights_that_it_would_have_ended_in_with_them(
    learnt: list[RunConfig], tmp_path: Path, frozen: tuple[str, ...]
) -> None:
    training = {"freeze": list(frozen)}
    one, other = copied(learnt, tmp_path / "one"), copied(learnt, tmp_path / "other")
    assert run(one, 1, training=training) == 0
    forget(tmp_path / "other", "moving_grasp")
    assert run(other, 1, training=training, **from_file(tmp_path / "other")) == 0
    contexts = list((tmp_path / "other" / "data" / ".cache").glob("contexts/moving_grasp-*/context.npy"))
    assert len(contexts) == ("vlm_text" in frozen)
    assert not (tmp_path / "other" / "data" / "moving_grasp").exists()
    folders = [stage_folder(configs[1]) for configs in (one, other)]
    assert_equal_weights(weights(folders[0]), weights(folders[1]))
    audits = [read(folder.path, "replay_audit.json") for folder in folders]
    assert audits[0] == audits[1]
    assert audits[1]["kept"]["moving_grasp"]["frames"] == 14
    assert audits[1]["drawn"]["moving_grasp"]["frames"] > 0
    assert audits[1]["frames_drawn_not_kept"] == audits[1]["held_out_frames_drawn"] == 0
    measured = [[{**record, "seconds": 0} for record in records(folder)] for folder in folders]
    assert measured[0] == measured[1]
    assert {record["task"] for record in measured[1]} == {"moving_grasp", "weighing", "placement"}
    best = [folder.path / "checkpoints" / "best" / "pretrained_model" for folder in folders]
    assert read(best[0], "tasks.json") == read(best[1], "tasks.json")
    facts = [
        [
            {**t["dataset"], "root": Path(t["dataset"]["root"]).name}
            for t in read(each[0].run_folder, "run.json")["tasks"]
        ]
        for each in (one, other)
    ]
    assert facts[0] == facts[1]


def test_the_file_holds_what_is_kept_and_what_is_held_out_and_nothing_else(
    learnt: list[RunConfig], tmp_path: Path
) -> None:
    configs = copied(learnt, tmp_path)
    (task,) = exported_tasks(
        changed(configs[1], **from_file(tmp_path)).data, stages(configs), ["moving_grasp"]
    ).values()
    whole = open_task(configs[0].stage, configs[0].data)
    kept = read(stage_folder(configs[0]).path, "replay_buffer.json")["episodes"]
    there = sorted([*kept, *whole.held_out_episodes])
    rows = whole.rows_of(there)
    assert np.unique(task.episode).tolist() == there
    assert len(task.state) == len(rows) == 3 * 14 == len(task.embeddings.pictured)
    for own, found in ((whole.state, task.state), (whole.action, task.action), (whole.frame, task.frame)):
        assert np.array_equal(own[rows], found)
    assert (task.instructions.texts, task.frames, task.train_frames) == (whole.instructions.texts, 70, 42)
    assert np.array_equal(task.mean_action, whole.mean_action)
    assert np.array_equal(task.action_limits, whole.action_limits)
    assert len(task.rows_of(sorted(set(whole.train_episodes) - set(kept)))) == 0
    with pytest.raises(RuntimeError, match="must hold the embedding of frame 0 of episode"):
        replace(task, tensors={**task.tensors, "pictured": task.tensors["pictured"] + 1}).embeddings(
            learnt[0].data.cameras[0], np.array([0])
        )


def test_the_sizes_of_its_parts_are_said_and_are_those_of_its_tensors(learnt: list[RunConfig], tmp_path: Path) -> None:
    found = exported(copied(learnt, tmp_path), 1, tmp_path)
    tensors = load_file(tmp_path / FILE)
    parts = found.parts["moving_grasp"]
    embeddings = sum(tensor.nbytes for name, tensor in tensors.items() if "/images/" in name)
    tables = sum(tensors[f"moving_grasp/{name}"].nbytes for name in ("state", "action", "instruction"))
    assert [(part.episodes, part.frames) for part in parts.values()] == [(1, 14), (2, 28)]
    assert [part.embeddings for part in parts.values()] == [embeddings / 3, embeddings * 2 / 3]
    assert [part.tables for part in parts.values()] == [tables / 3, tables * 2 / 3]
    lines = found.summary.splitlines()
    assert lines[1].startswith("  moving_grasp, kept: 1 episode, 14 frames: embeddings 3.9 KiB, states and actions")
    assert lines[2].startswith("  moving_grasp, held out: 2 episodes, 28 frames: embeddings 7.9 KiB")
    assert lines[3].startswith("  moving_grasp, its dataset: ")
    assert lines[4] == f"later stages read it with data.replay_file={tmp_path / FILE}"


def test_a_task_whose_demonstrations_are_gone_is_taken_over_into_the_next_file(
    learnt: list[RunConfig], tmp_path: Path
) -> None:
    configs = copied(learnt, tmp_path)
    forget(tmp_path, "moving_grasp")
    assert run(configs, 1, **from_file(tmp_path)) == 0
    before = load_file(tmp_path / FILE)
    exported(configs, 2, tmp_path, **from_file(tmp_path))
    after = load_file(tmp_path / FILE)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split("/")[0] for name in after} == {"moving_grasp", "weighing"}
    forget(tmp_path, "weighing")
    shown = examine_stage(changed(configs[2], **from_file(tmp_path)), stages(configs))
    assert shown.problems == []
    assert f"  note: weighing: read from {tmp_path / FILE}" in describe(shown)
    assert f"  images of weighing: embeddings of 42 frames in {tmp_path / FILE}" in describe(shown)
    assert [task["train_episodes"] for task in shown.facts["tasks"]] == [3, 3, 3]
    assert [task["kept"]["frames"] for task in shown.facts["tasks"]] == [14, 14, 14]
    assert run(configs, 2, **from_file(tmp_path)) == 0
    kept = read(stage_folder(configs[2]).path, "replay_audit.json")["kept"]
    assert {name: part["frames"] for name, part in kept.items()} == {"moving_grasp": 14, "weighing": 14}


def test_with_a_feature_stride_the_file_holds_embeddings_of_every_nth_frame_and_fits_no_other_stride(
    small_configs_in: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    configs = placed(small_configs_in(tmp_path / "outputs"), tmp_path, policy={"mem_backprop_depth": 2})
    configs = [changed(config, data={"feature_stride": 2}) for config in configs]
    assert run(configs) == 0
    found = exported(configs, 1, tmp_path).parts["moving_grasp"]
    assert (found["kept"].frames, found["held out"].frames) == (42, 28)
    assert found["kept"].embeddings * 28 == found["held out"].embeddings * 42
    content = safe_open(tmp_path / FILE, "pt").get_tensor("moving_grasp/pictured")
    assert content.tolist() == list(range(0, 70, 2))
    with_data = placed(configs, shutil.copytree(tmp_path, tmp_path.parent / "strided", symlinks=True))
    assert run(with_data, 1) == 0
    forget(tmp_path, "moving_grasp")
    every = replace(changed(configs[1], **from_file(tmp_path)).data, feature_stride=1)
    with pytest.raises(
        ConfigError, match=r"data.feature_stride must be 2, by which moving_grasp was exported .*, got 1"
    ):
        exported_tasks(every, stages(configs), ["moving_grasp"])
    assert run(configs, 1, **from_file(tmp_path)) == 0
    assert_equal_weights(*(weights(stage_folder(each[1])) for each in (with_data, configs)))


def test_of_single_frames_that_are_kept_the_file_holds_their_embeddings_alone(
    small_configs_in: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    how = {"replay": {"buffer": 0.1, "unit": "frame"}, "policy": {"mem_backprop_depth": 0}}
    configs = placed(small_configs_in(tmp_path / "outputs"), tmp_path, **how)
    assert run(configs) == 0
    found = exported(configs, 1, tmp_path)
    per_frame = found.parts["moving_grasp"]["held out"].embeddings // 28
    assert found.parts["moving_grasp"]["kept"].embeddings == 4 * per_frame
    with_data = placed(configs, shutil.copytree(tmp_path, tmp_path.parent / "with_data", symlinks=True))
    assert run(with_data, 1) == 0
    forget(tmp_path, "moving_grasp")
    assert run(configs, 1, **from_file(tmp_path)) == 0
    assert_equal_weights(*(weights(stage_folder(each[1])) for each in (with_data, configs)))
    assert read(stage_folder(configs[1]).path, "replay_audit.json")["frames_drawn_not_kept"] == 0
    frozen = changed(
        configs[1], run="frozen", training={"freeze": ["vision", "connector", "vlm_text"]}, **from_file(tmp_path)
    )
    shutil.copytree(configs[0].run_folder, frozen.run_folder, symlinks=True)
    shutil.rmtree(stage_folder(frozen).path)
    shown = describe(examine_stage(frozen, stages(configs)))
    assert "  keys and values: not kept, of moving_grasp single frames alone have embeddings" in shown


def test_episodes_that_are_set_apart_to_choose_alphas_on_are_in_the_file(
    small_configs_in: Configs, datasets: Path, tmp_path: Path
) -> None:
    shutil.copytree(datasets, tmp_path / "data")
    given = small_configs_in(tmp_path / "outputs", "strategy=merge_replay", "merge.episodes=1", "replay.buffer=0.5")
    configs = placed(given, tmp_path)
    assert run(configs) == 0
    parts = exported(configs, 1, tmp_path).parts["moving_grasp"]
    assert {name: part.episodes for name, part in parts.items()} == {"kept": 1, "held out": 2, "set apart": 1}
    forget(tmp_path, "moving_grasp")
    assert run(configs, 1, **from_file(tmp_path)) == 0
    assert read(stage_folder(configs[1]).path, "merge.json")["chosen"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the file says of its one task."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["content"])
    change(content["tasks"][0])
    save_file(load_file(path), path, {**metadata, "content": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: header["encoder"].update(weights="0" * 64),
            r"weights of the image encoder must be 000000000000…, by which moving_grasp was embedded, got \w{12}…",
        ),
        (
            lambda header: header["encoder"].update(precision="bf16"),
            "precision of the image encoder must be bf16, by which moving_grasp was embedded, got no",
        ),
        (lambda header: header["kept"].update(episodes=[]), "must hold of moving_grasp what is kept of it by .*json"),
        (lambda header: header.update(kept=None), "must hold of moving_grasp what is kept of it by .*json"),
        (lambda header: header.update(hash="0"), "the dataset of moving_grasp must stay what run smoke began with"),
        (
            lambda header: header["settings"].update({"data.split_seed": 3}),
            "data.split_seed must be 3, by which moving_grasp was exported to .*, got 0",
        ),
    ],
)
def test_a_file_that_is_not_the_runs_is_refused_by_name(
    learnt: list[RunConfig], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    configs = copied(learnt, tmp_path)
    rewrite(tmp_path / FILE, change)
    with pytest.raises(ConfigError, match=message):
        run(configs, 1, **from_file(tmp_path))
    assert stage_folder(configs[1]).status == "absent"


def problems(config: RunConfig, configs: list[RunConfig], path: Path) -> str:
    return "\n".join(examine_stage(changed(config, data={"replay_file": str(path)}), stages(configs)).problems)


def test_settings_that_the_file_cannot_serve_are_refused_by_name(learnt: list[RunConfig], tmp_path: Path) -> None:
    path = Path(learnt[0].outputs).parent / FILE
    learns = changed(learnt[1], training={"freeze": []})
    found = problems(learns, learnt, path)
    assert f"data.replay_file={path} must go with a stage that takes embeddings" in found
    assert "no pictures of moving_grasp, got pictures: the image encoder is trained; hold vision and" in found
    with pytest.raises(ConfigError, match=r"export_replay must find embeddings .*: the image encoder is trained; hold"):
        exported([learnt[0], learns, learnt[2]], 1, tmp_path)
    off = changed(learnt[1], data={"feature_cache": False})
    assert "got pictures: data.feature_cache=false; hold" in problems(off, learnt, path)
    said = problems(changed(learnt[1], data={"held_out_episodes": 1}), learnt, path)
    assert f"data.held_out_episodes must be 2, by which moving_grasp was exported to {path}, got 1" in said
    renamed = changed(learnt[0], stage={"instruction": "Take it."})
    said = problems(learnt[1], [renamed, *learnt[1:]], path)
    assert "stage.instruction must be 'Grasp the object" in said
    said = problems(learnt[0], learnt, path)
    assert f"data.replay_file={path} must hold tasks that have been learnt before (there are none)" in said
    assert "got 'moving_grasp'" in said
    said = problems(changed(learnt[1], run="fresh"), learnt, path)
    assert f"data.replay_file must go with a run that has its statistics, in {learnt[0].outputs}/fresh" in said
    said = problems(changed(learnt[1], replay={"buffer": None}), learnt, path)
    assert "must hold all 3 training episodes of moving_grasp where replay.buffer is null" in said
    with pytest.raises(ConfigError, match=r"stage 1 \(moving_grasp\) must have tasks learnt before it, whose data can"):
        exported(learnt, 0, tmp_path)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ConfigError, match=f"--file must be a place that can be written, with .* KiB free, got {path}/"):
        exported(learnt, 1, path)


def test_a_file_that_is_missing_damaged_or_another_is_refused(learnt: list[RunConfig], tmp_path: Path) -> None:
    whole, path = Path(learnt[0].outputs).parent / FILE, tmp_path / FILE
    assert f"data.replay_file must be a file that python -m kuavo_train.export_replay wrote, got '{path}'" in problems(
        learnt[1], learnt, path
    )
    path.write_bytes(whole.read_bytes()[:-1])
    assert "data.replay_file must be a whole file, got SafetensorError" in problems(learnt[1], learnt, path)
    save_file(load_file(whole), path)
    assert f"data.replay_file={path} must be of the format {FORMAT}, version 1, got (None, None)" in problems(
        learnt[1], learnt, path
    )


def test_demonstrations_that_the_file_stands_for_are_not_recorded_anew(
    learnt: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(setup, "ensure_all_recorded", lambda wanted, **_: recorded.extend(root.name for root in wanted))
    config = replace(learnt[1], simulation=SimulationConfig())
    record_missing_data(changed(config, **from_file(Path(learnt[0].outputs).parent)), stages(learnt))
    assert recorded == ["weighing", "placement"]


def test_the_command_writes_the_file_and_says_its_sizes(
    learnt: list[RunConfig], tmp_path: Path, small_run_in: Callable[..., list[str]], here: Callable[..., Any]
) -> None:
    folder = Path(learnt[0].outputs).parent
    given = [word for word in small_run_in(folder / "outputs") if not word.startswith(("learn=", "data.root="))]
    words = [*given, "learn=[moving_grasp,weighing,placement]", f"data.root={folder / 'data'}", "replay.buffer=0.3"]
    words += ["policy.mem_backprop_depth=2", "task=tasks/task2_weighing"]
    done = here("kuavo_train.export_replay", *words, f"--file={tmp_path / 'mine'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"{tmp_path / 'mine'}: ")
    assert (tmp_path / "mine").read_bytes() == (folder / FILE).read_bytes()
    assert here("kuavo_train.export_replay", *words).returncode == 0
    assert (folder / "outputs" / "smoke" / "replay_for_stage2_weighing.safetensors").is_file()
