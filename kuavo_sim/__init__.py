"""kuavo_sim: four jobs of a Kuavo-like dual-arm robot in MuJoCo, with an expert and a recorder.

Importing this package registers the environments with gymnasium. It needs no MuJoCo; making an environment does.
"""

import gymnasium

# Raise it with every change that makes the same seed give another episode: datasets of another version are refused.
__version__ = "1.1"

__all__ = ["ENVIRONMENT_IDS", "EVALUATION_SEED_START", "JOBS"]

# The keys of kuavo_sim.tasks.TASKS, in the order of learning.
JOBS = ("moving_grasp", "weighing", "placement", "sorting")

# Demonstrations use seeds below this, so evaluations that start here never meet a layout that was trained on.
EVALUATION_SEED_START = 1_000_000_000

# task name → gymnasium id, as in {"moving_grasp": "kuavo_sim/MovingGrasp-v0"}
ENVIRONMENT_IDS = {job: f"kuavo_sim/{job.title().replace('_', '')}-v0" for job in JOBS}

for _job, _id in ENVIRONMENT_IDS.items():
    gymnasium.register(_id, entry_point="kuavo_sim.env:KuavoEnv", kwargs={"task": _job})
