"""The four jobs for LeRobot's own commands, under the name `kuavo_sim`; importing this registers them.

    lerobot-eval --policy.path=<checkpoint>/pretrained_model --env.type=kuavo_sim --env.task=weighing \
        --seed=1000000000 --eval.n_episodes=50
    lerobot-rollout --policy.path=<checkpoint>/pretrained_model --robot.type=kuavo_sim --robot.task=weighing \
        --task="<instruction>" --fps=10 --duration=30 --return_to_initial_position=false

Give the evaluator a seed of `EVALUATION_SEED_START` or more: LeRobot's default is among those of demonstrations.
"""

from kuavo_sim.lerobot.environment import KuavoSimEnvConfig
from kuavo_sim.lerobot.robot import KuavoSimRobot, KuavoSimRobotConfig

__all__ = ["KuavoSimEnvConfig", "KuavoSimRobot", "KuavoSimRobotConfig"]
