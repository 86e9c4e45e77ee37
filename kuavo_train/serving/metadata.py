"""What the server says of itself to every robot that connects, in its first frame."""

from typing import Any

from kuavo_train.wrapper.policy.smolvla import SmolVLAPolicyWrapper

PROTOCOL = 1
"""Counts up where an answer or a request changes its meaning."""


def metadata(policy: SmolVLAPolicyWrapper, *, largest_request: int, session_timeout: float) -> dict[str, Any]:
    """Of a policy, for the wire."""
    known = policy.known
    return {
        "server": "kuavo_train",
        "protocol": PROTOCOL,
        "policy": policy.policy_type,
        "tasks": {
            task.name: {
                "instructions": list(task.instructions),
                "state_names": list(task.state_names),
                "action_names": list(task.action_names),
                "limits": {name: list(limits) for name, limits in task.action_limits.items()},
            }
            for task in known.tasks
        },
        "cameras": {camera: list(known.camera_sizes[camera]) for camera in policy.cameras},
        "fps": known.fps,
        "frames": policy.frames,
        "chunk_size": policy.chunk_size,
        "n_action_steps": policy.n_action_steps,
        "has_memory": policy.has_memory,
        "handover": ["wait", "blend", *(["rtc"] if policy.hands_over else [])],
        "largest_request": largest_request,
        "session_timeout": session_timeout,
    }
