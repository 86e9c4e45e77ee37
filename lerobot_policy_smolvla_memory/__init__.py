"""SmolVLA with a recurrent memory, as a LeRobot policy: importing this package registers `smolvla_memory`."""

from lerobot_policy_smolvla_memory.configuration_smolvla_memory import SmolVLAMemoryConfig
from lerobot_policy_smolvla_memory.memory import MemoryState
from lerobot_policy_smolvla_memory.modeling_smolvla_memory import SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.processor_smolvla_memory import make_smolvla_memory_pre_post_processors

__all__ = [
    "MemoryState",
    "SmolVLAMemoryConfig",
    "SmolVLAMemoryPolicy",
    "make_smolvla_memory_pre_post_processors",
]
