"""The memory suite evaluates what memory alone can know, trains through kuavo_train, and does nothing twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_main

from benchmarks.memory_suite.__main__ import main
from benchmarks.memory_suite.data import CAMERA, HeldOut, ensure_dataset, held_out
from benchmarks.memory_suite.decisions import decide, probe_of
from benchmarks.memory_suite.layouts import ACTION, FRAMES_PER_QUERY, PARTS, STATE, TASKS, Query, plain
from benchmarks.memory_suite.options import MEMORIES, Combination, Options
from benchmarks.memory_suite.study import Run, cpu_seconds, run_study
from benchmarks.memory_suite.table import table
from kuavo_train.compose import compose_run
from kuavo_train.data.images.frames import DecodedFrames
from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import open_task
from kuavo_train.errors import RunError
from kuavo_train.probing.memory_walk import MemoryProbe

TINY = {
    "policy": {"num_vlm_layers": 2, "num_steps": 2},
    "tiny_vlm": {"text_hidden": 48, "text_layers": 2, "vision_hidden": 48, "vision_layers": 1, "patch_size": 16},
    "validation": {"draws": 1},
}


def unit(names: Sequence[str]) -> dict[str, list[Any]]:
    n = len(names)
    return {"names": [*names], "mean": [0.0] * n, "std": [1.0] * n, "min": [-1.0] * n, "max": [1.0] * n, "count": [1]}


NORMALIZATION = Normalization("joint", {"observation.state": unit(STATE), "action": unit(ACTION)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Options:
    output = tmp_path_factory.mktemp("suite")
    return Options(steps=2, twin_steps=1, episodes=16, decisions=8, output=output, **TINY)  # type: ignore[arg-type]


class Kuavo:
    """kuavo_train's command in this process; remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Sequence[str]] = []

    def __call__(self, words: Sequence[str]) -> int:
        self.given.append(words)
        return run_main("kuavo_train", *words)


@pytest.fixture(scope="module")
def trained(tiny: Options) -> tuple[list[dict[str, Any]], Kuavo]:
    kuavo = Kuavo()
    return run_study(tiny, kuavo), kuavo


@pytest.mark.parametrize("task", TASKS)
def test_a_task_can_be_done_by_memory_alone_and_shows_every_cue_as_often(task: str) -> None:
    kind = TASKS[task]
    for part in PARTS:
        layouts = kind.layouts(task, part, 8)
        assert len(layouts[0].decisions) == len(layouts[-1].decisions)
        for layout in layouts:
            layout.check()  # identical at every decision, each answer once
            assert layout.variants == kind.answers == round(1 / kind.chance)
            last = max(decision.query for decision in layout.decisions)
            assert last >= (2 * kind.delays[-1] if part == "twice" else kind.delays[0])
            shown = [
                [layout.picture(variant, query * FRAMES_PER_QUERY).tobytes() for query in range(len(layout.queries))]
                for variant in range(kind.answers)
            ]
            cue_ends = max(decision.cue_ends for decision in layout.decisions)
            assert len({b"".join(pictures[: cue_ends + 1]) for pictures in shown}) == kind.answers  # the cue is shown,
            assert len({b"".join(pictures[cue_ends + 1 :]) for pictures in shown}) == 1  # and then no more


@pytest.mark.parametrize("task", TASKS)
def test_no_layout_is_both_trained_on_and_held_out(task: str) -> None:
    shown = [
        layout.picture(0, layout.length - 1).tobytes()
        for part in PARTS
        for layout in TASKS[task].layouts(task, part, 6)
    ]
    assert len(set(shown)) == len(shown) == 6 * len(PARTS)


def test_a_decision_that_can_be_seen_is_refused() -> None:
    (layout,) = TASKS["colour"].layouts("colour", "training", 1)
    mark = layout.queries[-1]
    leaking = replace(layout, queries=[*layout.queries[:-1], Query(plain(250, 251, 250, 250), mark.actions)])
    with pytest.raises(AssertionError, match=r"pictures of .* must be identical"):
        leaking.check()
    same = replace(layout, queries=[*layout.queries[:-1], Query(mark.drawings, np.ones((4, 2), np.float32))])
    with pytest.raises(AssertionError, match=r"actions of .* must differ"):
        same.check()


def test_the_dataset_holds_what_is_drawn_and_preflight_accepts_it(tiny: Options, here: Callable[..., Any]) -> None:
    ensure_dataset("colour", tiny.data, tiny.episodes)
    words = Combination(tiny, "colour", "nothing", "recurrent", 0).words()
    (config,) = compose_run(words)
    task = open_task(config.stage, config.data)
    frames = DecodedFrames(task, image_size=None, video_backend="pyav")
    drawn = HeldOut("colour", TASKS["colour"].layouts("colour", "training", 4))
    rows = np.arange(len(task.state))
    assert torch.equal(frames(CAMERA, rows), drawn.pictures(CAMERA, rows))
    assert np.array_equal(task.state, drawn.task.state)
    assert np.array_equal(task.action, drawn.task.action)
    last = frames(CAMERA, task.bounds[:, 1] - 1).reshape(4, 4, -1)
    assert torch.equal(last, last[:, :1].expand_as(last))
    shown = here("kuavo_train.preflight", *words)
    assert shown.returncode == 0, shown.stderr
    assert "2 steps of 32 samples" in shown.stdout


@dataclass(frozen=True)
class Oracle(MemoryProbe):
    """Remembers the answer, and acts on it."""

    answers: Sequence[int] = ()
    episodes: HeldOut | None = None

    def intervened(self, walk: Any, questions: Any, cue_seen: Any, donors: Any) -> dict[str, Any]:
        on = list(self.answers)
        assert self.episodes is not None
        ends = [layout.decisions[0].cue_ends for layout, _ in self.episodes.members]
        seen = [answer if last >= end else 0 for answer, last, end in zip(on, cue_seen, ends, strict=True)]
        return {"on": on, "reset": [0] * len(on), "frozen": seen, "swapped": [on[donor] for donor in donors]}

    def predict(self, draws: Any, memory: Any, noise: torch.Tensor, instruction: str | None = None) -> np.ndarray:
        assert self.episodes is not None
        chunk = np.zeros((len(draws), self.policy.config.chunk_size, len(ACTION)), np.float32)
        for place, answer in enumerate(memory):
            layout = self.episodes.members[place][0]
            (decision,) = layout.decisions
            variant = decision.answers.index(answer)
            chunk[place, :FRAMES_PER_QUERY] = layout.actions(variant)[decision.query * FRAMES_PER_QUERY]
        return chunk


def untrained(tmp_path: Path, tiny: Options, memory: str) -> tuple[Any, Any]:
    """Policy with new weights that says something, and its preprocessor."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors

    from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
    from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

    vlm = make_tiny_vlm(
        tmp_path / "vlm",
        **TINY["tiny_vlm"],  # type: ignore[arg-type]
        image_size=32,
        corpus=[kind.instruction for kind in TASKS.values()],
    )
    torch.manual_seed(0)
    config = SmolVLAMemoryConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=True,
        device="cpu",
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (len(STATE),)),
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(ACTION),))},
        resize_imgs_with_padding=(32, 32),
        tokenizer_max_length=48,
        chunk_size=16,
        n_action_steps=FRAMES_PER_QUERY,
        num_vlm_layers=2,
        num_steps=2,
        num_mem_tokens=2 if memory in ("recurrent", "both") else 0,
        mem_frames=2 if memory in ("frames", "both") else 0,
        mem_backprop_depth=1,
    )
    policy = SmolVLAMemoryPolicy(config)
    with torch.no_grad():  # new weights answer 0 to everything
        policy.model.action_out_proj.bias.normal_(std=2.0)
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=NORMALIZATION.for_lerobot())
    return policy, preprocessor


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_is_right_and_follows_its_donor(task: str, tmp_path: Path, tiny: Options) -> None:
    policy, preprocessor = untrained(tmp_path, tiny, "none")
    episodes = held_out(task, "trained", 24)
    for number in range(len(episodes.layouts[0].decisions)):
        # one decision at a time: an oracle holds the answers of one
        alone = replace(
            episodes, layouts=[replace(each, decisions=[each.decisions[number]]) for each in episodes.layouts]
        )
        answers = [answer for layout in alone.layouts for answer in layout.decisions[0].answers]
        plain_probe = probe_of(policy, preprocessor, NORMALIZATION, alone)
        oracle = Oracle(plain_probe.policy, plain_probe.dataset, preprocessor, answers, alone)
        found = decide(oracle, NORMALIZATION, alone)
        n = len(alone.members)
        assert {name: row["right"] / n for name, row in found.items()} == {
            "on": 1,
            "reset": pytest.approx(TASKS[task].chance),
            "frozen": 1,
            "swapped": 1,
        }


@pytest.mark.parametrize("task", TASKS)
def test_without_memory_exactly_chance_is_right_and_so_with_a_memory_reset(
    task: str, tmp_path: Path, tiny: Options
) -> None:
    episodes = held_out(task, "trained", 8)
    for memory, intervention in (("none", "on"), ("recurrent", "reset"), ("frames", "reset")):
        policy, preprocessor = untrained(tmp_path, tiny, memory)
        row = decide(probe_of(policy, preprocessor, NORMALIZATION, episodes), NORMALIZATION, episodes)[intervention]
        assert row["n"] == len(episodes.members) * len(episodes.layouts[0].decisions)
        assert row["right"] == round(row["n"] * TASKS[task].chance)


def test_a_memory_joins_the_twin_frozen_and_is_evaluated(
    trained: tuple[list[dict[str, Any]], Kuavo], tiny: Options
) -> None:
    (record,), kuavo = trained
    twin, joined = kuavo.given
    assert "policy.num_mem_tokens=0" in twin
    assert "training.freeze_first_stage=[vision,connector,vlm_text]" in joined
    assert any("colour-nothing-none" in word for word in joined if word.startswith("policy.pretrained_path="))
    assert record["steps"] == 2
    for part in ("trained", "twice"):
        assert set(record[part]) == {"on", "reset", "frozen", "swapped"}
        assert record[part]["reset"]["right"] == 2 == record[part]["reset"]["n"] / 4
    assert [point["step"] for point in record["curve"]] == [2]
    assert record["cpu_seconds"] > 0
    assert record["settings"]["policy"]["mem_backprop_depth"] == 16
    row = table([record, {**record, "seed": 1}]).splitlines()[-1]
    assert "| colour | frozen | recurrent | 0,1 | 0.25 |" in row
    assert "| 4/16 |" in row


def test_every_kind_of_memory_joins_one_twin_and_no_setting_of_frames_is_told_where_there_are_none(
    tiny: Options,
) -> None:
    runs = {memory: Run.of(next(replace(tiny, memory=(memory,)).combinations())) for memory in MEMORIES}
    assert len({run.name for run in runs.values()}) == len(runs) == 4
    assert len({run.twin.name for run in runs.values() if run.twin is not None}) == 1
    policies = {memory: run.settings["policy"] for memory, run in runs.items()}
    assert {
        memory: (policy.get("num_mem_tokens"), policy.get("mem_frames")) for memory, policy in policies.items()
    } == {
        "recurrent": (4, None),
        "frames": (0, 8),
        "both": (4, 8),
        "none": (None, None),
    }
    assert not [key for key in policies["recurrent"] if key.startswith("mem_frame")]


def test_what_is_there_is_skipped_and_the_twin_is_trained_once(
    trained: tuple[list[dict[str, Any]], Kuavo], tiny: Options
) -> None:
    (record,), _ = trained
    kuavo = Kuavo()
    assert run_study(tiny, kuavo) == [record]
    assert kuavo.given == []
    assert len(tiny.results.read_text().splitlines()) == 1
    changed = {**tiny.policy, "mem_update": "overwrite", "num_mem_tokens": 2}
    other = Run.of(next(replace(tiny, policy=changed).combinations()))
    assert other.settings != record["settings"]
    assert other.twin is not None
    other.twin.trained(kuavo)
    assert kuavo.given == []


def test_a_run_that_was_cut_off_goes_on(trained: tuple[list[dict[str, Any]], Kuavo], tiny: Options) -> None:
    given: list[str] = []

    def killed(words: Sequence[str]) -> int:
        given.extend(words)
        return 137

    (changed,) = replace(tiny, seed=(1,), situation=("nothing",)).combinations()
    with pytest.raises(RunError, match=r"colour-nothing-recurrent-seed1-\w+ must be trained to its end, .* 137"):
        Run.of(changed).trained(killed)
    assert "resume=true" in given
    assert cpu_seconds([{"cpu_seconds": seconds} for seconds in (10.0, 20.0, 12.5)]) == 32.5


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for word, message in (
        ("task=color", "task must be one of colour"),
        ("memory=big", "memory must be one of recurrent, frames, both, none"),
        ("situation=here", "situation must be one of nothing, twin, frozen"),
        ("steps=0", "steps must be at least 1"),
        ("polcy.x=1", "arguments must be key=value with a key of task, situation"),
    ):
        assert main([word]) == 2
        assert message in capsys.readouterr().err
