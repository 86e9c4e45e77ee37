"""Skills are done by their expert, are new in every episode, and hold nothing of a job."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import kuavo_sim
from kuavo_sim.env import KuavoEnv
from kuavo_sim.expert import demonstrate
from kuavo_sim.record import RecordSettings, record
from kuavo_sim.scene import BLUE, GREEN, RED
from kuavo_sim.skills import CUE_SKILLS, SKILLS
from kuavo_sim.tasks import TASKS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEEDS = range(900, 906)
ALL = {**SKILLS, **CUE_SKILLS}


@pytest.fixture(scope="module")
def begun() -> dict[str, list[KuavoEnv]]:
    """Skill → environments at the beginning of an episode each."""
    environments = {name: [KuavoEnv(name, renderer="none", image_size=8) for _ in SEEDS] for name in ALL}
    for each in environments.values():
        for env, seed in zip(each, SEEDS, strict=True):
            env.reset(seed=seed)
    return environments


@pytest.mark.parametrize("skill", ALL)
def test_the_expert_succeeds_within_the_time_limit(skill: str) -> None:
    env = KuavoEnv(skill, renderer="none", image_size=8)
    for seed in SEEDS[:2]:
        demonstration = demonstrate(env, seed)
        assert demonstration.success, seed
        assert len(demonstration.actions) < 0.8 * ALL[skill].time_limit


def test_no_skill_has_a_jobs_instruction_sub_goals_or_cue(begun: dict[str, list[KuavoEnv]]) -> None:
    of_jobs = [" ".join(words(job.instruction)) for job in TASKS.values()]
    subgoals = {name for job in TASKS.values() for name in job.subgoals}
    cues = {name for job in TASKS.values() for name in job.cues}
    for name, environments in begun.items():
        assert not cues & set(ALL[name].cues)
        assert not subgoals & set(ALL[name].subgoals)
        assert len(ALL[name].subgoals) < min(len(job.subgoals) for job in TASKS.values())
        for env in environments:
            said = words(env.task.instruction)
            runs = {" ".join(said[i : i + 5]) for i in range(len(said) - 4)}
            assert not any(run in job for run in runs for job in of_jobs), env.task.instruction
            assert (env.task.cue is None) == (name in SKILLS)


def test_no_skill_shows_its_cue_as_a_job_does() -> None:
    """Where a job's lamp, sign or target is, or in one of their colours."""
    furniture = {job: geoms(begin(job, cue=0)) for job in TASKS}
    for name in CUE_SKILLS:
        for seed in SEEDS:
            one, other = (geoms(begin(name, seed=seed, cue=cue)) for cue in (0, 1))
            shows = {geom for geom in one if one[geom] != other[geom]}
            assert shows
            for geom in shows:
                assert not any(geom in job for job in furniture.values())
                for shown in (one[geom], other[geom]):
                    assert all(np.abs(np.subtract(shown, colour)).max() > 0.3 for colour in (RED, BLUE, GREEN))


def test_words_and_goals_do_not_tell_what_a_cue_does() -> None:
    for name in CUE_SKILLS:
        for seed in SEEDS:
            one, other = (begin(name, seed=seed, cue=cue).task for cue in (0, 1))
            assert one.instruction == other.instruction
            right, left = one.goals  # type: ignore[attr-defined]
            assert right.centre[1] < left.centre[1]
            assert (right.kind, right.half, right.top) == (left.kind, left.half, left.top)
            assert (right.colour == left.colour) == (name == "put_where_shown")


def test_a_cue_is_shown_until_the_object_is_in_the_hand_and_never_again() -> None:
    env = begin("put_where_shown", cue=1)
    shown = geoms(env)["post1"]
    assert shown != geoms(env)["post0"]
    env.task.world.put_in_hand(env.task.side)  # type: ignore[attr-defined]
    for claw in (1.0, 0.0):
        action = env.task.world.target.copy()
        action[[7, 15]] = claw
        for _ in range(3):
            env.step(action)
        assert env.task.world.held == bool(claw)
        assert geoms(env)["post1"] == geoms(env)["post0"] != shown


def test_the_base_is_recorded_from_seeds_of_its_own() -> None:
    seeds = {
        file.stem: settings["seed"]
        for file in (CONFIGS / "profile").glob("*.yaml")
        if "seed" in (settings := yaml.safe_load(file.read_text()).get("simulation") or {})
    }
    base = seeds.pop("base")
    assert base not in seeds.values()
    assert (base + 1) * 100_000 <= kuavo_sim.EVALUATION_SEED_START


def test_the_base_is_taught_every_skill_and_nothing_else() -> None:
    stages = [yaml.safe_load(file.read_text())["stage"] for file in sorted((CONFIGS / "skills").glob("*.yaml"))]
    assert [stage["name"] for stage in stages] == [stage["simulation_task"] for stage in stages] == list(SKILLS)
    assert {stage["instruction"] for stage in stages} == {"dataset"}
    beside = [yaml.safe_load(file.read_text())["stage"] for file in sorted((CONFIGS / "cue_skills").rglob("*.yaml"))]
    assert [stage["name"] for stage in beside] == [stage["simulation_task"] for stage in beside] == list(CUE_SKILLS)
    recipe = ("instruction", "epochs", "lr", "warmup_steps", "decay_steps")
    assert {tuple(stage[key] for key in recipe) for stage in beside} <= {tuple(stages[0][key] for key in recipe)}


def test_episodes_differ_in_words_and_places(begun: dict[str, list[KuavoEnv]]) -> None:
    for name, environments in begun.items():
        tasks = [env.task for env in environments]
        assert len({task.instruction for task in tasks}) > len(tasks) // 2, name
        assert len({task.world.object_position().round(3).tobytes() for task in tasks}) == len(tasks)


def test_either_arm_begins(begun: dict[str, list[KuavoEnv]]) -> None:
    for number in range(2):  # a half of the seeds, of all skills
        sides = [each[number].task.side for each in begun.values()]  # type: ignore[attr-defined]
        assert {"left", "right"} == set(sides)


def test_one_seed_is_another_layout_in_every_skill_and_the_same_in_each(begun: dict[str, list[KuavoEnv]]) -> None:
    starts = {name: environments[0].task.world.state().tobytes() for name, environments in begun.items()}
    assert len(set(starts.values())) == len(ALL)
    again = KuavoEnv("put_on_box", renderer="none", image_size=8)
    again.reset(seed=SEEDS[0])
    assert again.task.world.state().tobytes() == starts["put_on_box"]
    assert again.task.instruction == begun["put_on_box"][0].task.instruction


def test_what_is_to_be_put_down_after_a_turn_is_in_the_hand_from_the_beginning() -> None:
    env = KuavoEnv("turn_and_put", renderer="none", image_size=8)
    env.reset(seed=3)
    world, side = env.task.world, env.task.side  # type: ignore[attr-defined]
    assert world.holds(side)
    before = world.object_position() - world.tool_position(side)
    for _ in range(3):
        env.step(world.target)
    assert world.holds(side)
    np.testing.assert_allclose(world.object_position() - world.tool_position(side), before, atol=0.01)


def test_every_episode_is_recorded_and_announced_in_its_own_words(tmp_path: Path) -> None:
    root = record(RecordSettings("drive_and_pick", episodes=2, image_size=16), tmp_path / "skill", workers=1)
    dataset = LeRobotDataset("kuavo_sim/drive_and_pick", root=root)
    seeds = [json.loads(line)["seed"] for line in (root / "kuavo_sim_episodes.jsonl").read_text().splitlines()]
    env = KuavoEnv("drive_and_pick", renderer="none", image_size=8)
    told = [env.reset(seed=seed)[1]["instruction"] for seed in seeds]
    assert env.task_description == told[-1]
    assert list(dataset.meta.tasks.index) == told
    assert len(set(told)) == 2
    assert "instruction" not in KuavoEnv("weighing", renderer="none", image_size=8).reset(seed=0)[1]


def begin(name: str, *, seed: int = 900, cue: int) -> KuavoEnv:
    env = KuavoEnv(name, renderer="none", image_size=8)
    env.reset(seed=seed, options={"cue": cue} if env.task.cues else {})
    return env


def geoms(env: KuavoEnv) -> dict[str, tuple[float, ...]]:
    """Name → colour."""
    model = env.task.world.model
    return {model.geom(each).name: tuple(model.geom_rgba[each, :3].tolist()) for each in range(model.ngeom)}


def words(sentence: str) -> list[str]:
    return sentence.lower().replace(",", "").replace(".", "").split()
