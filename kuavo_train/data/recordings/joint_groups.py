"""Which joint group a dimension belongs to, by its name."""

from collections.abc import Sequence

import numpy as np

BASE_GROUPS = {  # each of one unit
    "cmd_pos_x": "base_position",  # m
    "cmd_pos_y": "base_position",
    "cmd_pos_yaw": "base_yaw",  # rad
    "ctrl_change_cmd": "base_mode",  # a switch, 0 or 1
}


def columns_by_group(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Joint group → places in `names`, groups in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        groups.setdefault(joint_group(name), []).append(column)
    return {group: np.array(columns) for group, columns in groups.items()}


def joint_group(name: str) -> str:
    """left_arm, right_arm (rad), claws, base_position (m), base_yaw (rad), base_mode (a switch), or other."""
    if name.startswith("zarm_l"):
        return "left_arm"
    if name.startswith("zarm_r"):
        return "right_arm"
    if name.endswith("_claw") or name.startswith("gripper_"):  # a converter calls the claws' state gripper_l, gripper_r
        return "claws"
    return BASE_GROUPS.get(name, "other")
