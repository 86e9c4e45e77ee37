"""Drive a Kuavo that runs ROS Noetic: three compressed pictures and the joints in, arm, claw and base commands out.

    python3 kuavo_ros_noetic.py ws://192.168.26.1:8000 sorting        # rospy, kuavo_msgs and kuavo_client must be there

Not tried on a robot: the topics, their order and their units below are those of LejuRobotics' public code. Check them
on yours with `rostopic echo` and with the arms unloaded before you let it move. Everything between the two functions
`observe` and `act` is kuavo_client's, and is tested with a simulated robot behind them.
"""

from __future__ import annotations

import math
import signal
import sys

import numpy as np

from kuavo_client import RobotLoop

# All names in one place: what the policy calls it, and where ROS has it.
CAMERAS = {
    "observation.images.head_cam_h": "/cam_h/color/image_raw/compressed",
    "observation.images.wrist_cam_l": "/cam_l/color/image_raw/compressed",
    "observation.images.wrist_cam_r": "/cam_r/color/image_raw/compressed",
}
SENSORS, CLAW_STATE = "/sensors_data_raw", "/leju_claw_state"
ARMS, CLAWS, BASE = "/kuavo_arm_traj", "/leju_claw_command", "/cmd_pose"
ARM_JOINTS = slice(12, 26)  # of joint_data.joint_q: twelve of the legs come first, the head's two last
CLAW_SCALE = 100.0  # of ROS, for the policy's [0, 1]
MOVES = 0.5  # of ctrl_change_cmd: above it the base moves, else the arms


def state_of(arm_joints, claws):
    """[16] as the policy was trained: left arm, left claw, right arm, right claw; rad and [0, 1]."""
    left, right = np.asarray(arm_joints[:7]), np.asarray(arm_joints[7:14])
    claws = np.asarray(claws) / CLAW_SCALE
    return np.concatenate([left, claws[:1], right, claws[1:2]]).astype(np.float32)


def commands_of(action):
    """An action of 16 or 20 dimensions → arms [14] in degrees and claws [2], or None; base (x, y, yaw), or None."""
    action = np.asarray(action, dtype=float)
    if len(action) == 20 and action[19] > MOVES:
        return None, None, tuple(action[16:19])
    arms = np.concatenate([action[0:7], action[8:15]]) * 180 / math.pi
    return arms.tolist(), (CLAW_SCALE * np.clip(action[[7, 15]], 0, 1)).tolist(), None


class Kuavo:
    """The robot, behind the two functions of `RobotLoop`."""

    def __init__(self):
        import rospy
        from geometry_msgs.msg import Twist
        from kuavo_msgs.msg import lejuClawCommand, lejuClawState, sensorsData
        from sensor_msgs.msg import CompressedImage, JointState

        self._rospy, self._twist, self._claw_command, self._joint_state = rospy, Twist, lejuClawCommand, JointState
        self._latest = {}
        for key, topic in CAMERAS.items():
            rospy.Subscriber(topic, CompressedImage, self._keep, key, queue_size=1, buff_size=2**24)
        rospy.Subscriber(SENSORS, sensorsData, self._keep, SENSORS, queue_size=1)
        rospy.Subscriber(CLAW_STATE, lejuClawState, self._keep, CLAW_STATE, queue_size=1)
        self._arms = rospy.Publisher(ARMS, JointState, queue_size=1)
        self._claws = rospy.Publisher(CLAWS, lejuClawCommand, queue_size=1)
        self._base = rospy.Publisher(BASE, Twist, queue_size=1)

    def _keep(self, message, key):
        self._latest[key] = message

    def wait(self):
        """Until everything has been seen once."""
        while not self._rospy.is_shutdown() and not {*CAMERAS, SENSORS, CLAW_STATE} <= self._latest.keys():
            missing = sorted({*CAMERAS.values(), SENSORS, CLAW_STATE} - {CAMERAS.get(key, key) for key in self._latest})
            self._rospy.loginfo_throttle(5, "waiting for " + ", ".join(missing))
            self._rospy.sleep(0.05)

    def observe(self):
        seen = dict(self._latest)
        pictures = {key: bytes(seen[key].data) for key in CAMERAS}  # JPEG, as the camera gave it
        joints, claws = seen[SENSORS].joint_data.joint_q[ARM_JOINTS], seen[CLAW_STATE].data.position
        return dict(pictures, **{"observation.state": state_of(joints, claws)})

    def act(self, action):
        arms, claws, base = commands_of(action)
        if base is not None:
            pose = self._twist()
            pose.linear.x, pose.linear.y, pose.angular.z = base
            self._base.publish(pose)
            return
        joints = self._joint_state()
        joints.name, joints.position = ["arm_joint_%d" % number for number in range(1, 15)], arms
        joints.header.stamp = self._rospy.Time.now()
        self._arms.publish(joints)
        command = self._claw_command()
        command.data.name, command.data.position = ["left_claw", "right_claw"], claws
        command.data.velocity, command.data.effort = [50.0, 50.0], [1.0, 1.0]
        self._claws.publish(command)


def main(server, task):
    import rospy

    rospy.init_node("kuavo_policy", disable_signals=True)
    robot = Kuavo()
    robot.wait()
    with open("kuavo_ticks.jsonl", "w") as log:
        loop = RobotLoop(robot.observe, robot.act, server, task, rate=10, handover="blend", log=log)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: loop.request_stop())
        print(loop.run())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: kuavo_ros_noetic.py ws://SERVER:PORT TASK")
    main(*sys.argv[1:])
