"""What LeRobot's commands import by themselves: the policy `smolvla_memory`, and the simulated jobs as `kuavo_sim`.

LeRobot imports the module of every distribution whose name begins with `lerobot_policy_` or `lerobot_env_`. This file
bears the distribution's name, so that the policy and the simulation need not know each other. Both are only registered
here; MuJoCo is imported when a command chooses the simulation.
"""

import kuavo_sim.lerobot
import lerobot_policy_smolvla_memory

__all__ = ["kuavo_sim", "lerobot_policy_smolvla_memory"]
