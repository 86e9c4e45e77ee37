"""kuavo_sim: four jobs of a Kuavo-like dual-arm robot in MuJoCo, and skills for them, with an expert and a recorder.

Importing this package registers the environments with gymnasium. It needs no MuJoCo; making an environment does.
"""

import gymnasium

# Raise it with every change that makes the same seed give another episode: datasets of another version are refused.
__version__ = "1.3"

__all__ = ["CUE_SKILLS", "ENVIRONMENT_IDS", "EVALUATION_SEED_START", "JOBS", "SKILLS"]

# The keys of kuavo_sim.tasks.TASKS, in the order of learning.
JOBS = ("moving_grasp", "weighing", "placement", "sorting")

# The keys of kuavo_sim.skills.SKILLS: what a small base is pretrained on.
SKILLS = (
    "put_on_mark",
    "put_in_bin",
    "put_on_box",
    "take_from_belt",
    "hand_over",
    "drive_and_pick",
    "turn_and_put",
)

# The keys of kuavo_sim.skills.CUE_SKILLS: beside them for a small base that meets a memory.
CUE_SKILLS = ("put_where_shown", "put_in_shown_colour")

# Demonstrations use seeds below this, so evaluations that start here never meet a layout that was trained on.
EVALUATION_SEED_START = 1_000_000_000

# job or skill → gymnasium id, as in {"moving_grasp": "kuavo_sim/MovingGrasp-v0"}
ENVIRONMENT_IDS = {name: f"kuavo_sim/{name.title().replace('_', '')}-v0" for name in (*JOBS, *SKILLS, *CUE_SKILLS)}

for _job, _id in ENVIRONMENT_IDS.items():
    gymnasium.register(_id, entry_point="kuavo_sim.env:KuavoEnv", kwargs={"task": _job})
