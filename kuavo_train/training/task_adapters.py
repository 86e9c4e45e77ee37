"""Adapters of single tasks in a stage: what the policy must know of them, and that the newest alone trains."""

from collections.abc import Sequence

from lerobot.policies.pretrained import PreTrainedPolicy
from transformers import AutoTokenizer

from kuavo_train.config import AdaptersConfig
from kuavo_train.reading import Json


def adapter_fields(settings: AdaptersConfig | None, learnt: Sequence[Sequence[str]], vlm_name: str) -> Json:
    """Fields of the policy's config; none in the first stage, whose task has no adapter.

    Args:
        learnt: of each task by the end of the stage, its instructions.
        vlm_name: whose tokenizer the policy has.
    """
    if settings is None or len(learnt) < 2:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(vlm_name)
    return {
        "adapter_instructions": [[tokenizer(text + "\n").input_ids for text in task] for task in learnt],
        "adapter_rank": settings.rank,
        "adapter_start": settings.start,
    }


def hold_all_but_the_newest(policy: PreTrainedPolicy) -> None:
    """Take all weights out of training but those of the last adapter, where there are adapters."""
    adapters = getattr(policy.model, "adapters", None) if hasattr(policy, "model") else None
    if adapters is not None:
        policy.requires_grad_(False)
        adapters.of_task[-1].requires_grad_(True)
