"""Adapters: `strategy=adapters`, a low-rank adapter for each task but the first, chosen by the instruction.

The first stage trains the policy as any other. From then on all its weights stay, and each task has A and B of its own
beside the layers of expert and projections, as in TAIL (Liu et al. 2024, arXiv 2310.05905). No earlier task's function
is touched, so nothing is forgotten as long as instructions tell the tasks apart; nothing is handed back either.

A new adapter begins as that of the task with the most similar instructions. A first loss on the new task would be the
other measure: it needs a pass over data for each adapter, before an average or an optimizer holds the weights. Words
are what chooses at inference as well.

It is the policy that has the adapters (lerobot_policy_smolvla_memory/adapters.py), and its checkpoints hold them apart.
"""

from kuavo_train.config import AdaptersConfig
from kuavo_train.strategies.strategy import Strategy


class Adapters(Strategy):
    Settings = AdaptersConfig
