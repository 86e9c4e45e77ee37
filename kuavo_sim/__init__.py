"""kuavo_sim: four jobs of a Kuavo-like dual-arm robot in MuJoCo, with an expert and a recorder."""

import gymnasium

from kuavo_sim.env import EVALUATION_SEED_START, KuavoEnv
from kuavo_sim.tasks import TASKS

# Raise it with every change that makes the same seed give another episode: datasets of another version are refused.
__version__ = "1.1"

__all__ = ["ENVIRONMENT_IDS", "EVALUATION_SEED_START", "TASKS", "KuavoEnv"]

# task name → gymnasium id, as in {"moving_grasp": "kuavo_sim/MovingGrasp-v0"}
ENVIRONMENT_IDS = {task: f"kuavo_sim/{task.title().replace('_', '')}-v0" for task in TASKS}

for _task, _id in ENVIRONMENT_IDS.items():
    gymnasium.register(_id, entry_point="kuavo_sim.env:KuavoEnv", kwargs={"task": _task})
