"""What memory costs: a training step with it against one without, per frame learnt.

    python -m benchmarks.memory_cost                       # the embedded profile's sizes
    python -m benchmarks.memory_cost rounds=20 depth=4,8 layout=start,end batch_size=32 threads=1

A step is forward, backward and AdamW on the same random batch. The variants take turns, one step each a round, so
that whatever else the machine does hits all of them; the ratio is the median over rounds of the ratio within the
round. Every part of the model learns ("nothing frozen"), or all but vision and connector, or all but the expert, the
projections and the memory ("VLM frozen"), as on a robot.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

from benchmarks.remember_colour import LAYOUTS
from kuavo_train.learning.freezing import freeze
from lerobot_policy_smolvla_memory import SmolVLAMemoryConfig, SmolVLAMemoryPolicy
from lerobot_policy_smolvla_memory.tiny_vlm import make_tiny_vlm

CAMERAS = [f"observation.images.{name}" for name in ("head_cam_h", "wrist_cam_l", "wrist_cam_r")]
LANGUAGE, STATE, ACTIONS, CHUNK, SIZE = 48, 16, 20, 16, 64
FROZEN = {
    "nothing frozen": [],
    "vision frozen": ["vision", "connector"],
    "VLM frozen": ["vision", "connector", "vlm_text"],
}


def make_policy(vlm: Path, frozen: Sequence[str], tokens: int, layout: str) -> SmolVLAMemoryPolicy:
    """The policy of the embedded profile."""
    at_start, at_end = LAYOUTS[layout]
    config = SmolVLAMemoryConfig(
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        device="cpu",
        input_features={
            OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE,)),
            **{camera: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for camera in CAMERAS},
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
        resize_imgs_with_padding=(SIZE, SIZE),
        chunk_size=CHUNK,
        n_action_steps=8,
        num_vlm_layers=4,
        freeze_vision_encoder="vision" in frozen,
        train_expert_only="vlm_text" in frozen,
        num_mem_tokens=tokens,
        mem_at_start=at_start,
        mem_at_end=at_end,
    )
    torch.manual_seed(0)
    policy = SmolVLAMemoryPolicy(config)
    freeze(policy, list(frozen))
    return policy.train()


def make_batch(rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        **{camera: torch.rand(rows, 3, SIZE, SIZE, generator=generator) for camera in CAMERAS},
        OBS_STATE: torch.randn(rows, STATE, generator=generator),
        OBS_LANGUAGE_TOKENS: torch.randint(8, 256, (rows, LANGUAGE), generator=generator),
        OBS_LANGUAGE_ATTENTION_MASK: torch.ones(rows, LANGUAGE, dtype=torch.bool),
        ACTION: torch.randn(rows, CHUNK, ACTIONS, generator=generator),
    }


def measure(frozen: str, variants: Sequence[tuple[str, int]], *, rows: int, rounds: int) -> list[str]:
    """A table row per variant (layout, K): median milliseconds, and the ratio to no memory with its quartiles."""
    batch = make_batch(rows)
    with tempfile.TemporaryDirectory() as folder:
        vlm = make_tiny_vlm(Path(folder) / "vlm", corpus=["put the parcel into the container"])
        policies = [(make_policy(vlm, FROZEN[frozen], 0, "end"), 1)]
        policies += [(make_policy(vlm, FROZEN[frozen], 4, layout), depth) for layout, depth in variants]
    steppers = [
        (policy, torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5), depth)
        for policy, depth in policies
    ]
    times: list[list[float]] = [[] for _ in steppers]
    for number in range(rounds + 2):
        for (policy, optimizer, depth), mine in zip(steppers, times, strict=True):
            began = time.process_time()
            loss, _ = policy(dict(batch), queries=depth)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number >= 2:  # the first rounds warm up
                mine.append(time.process_time() - began)
    lines = [f"| {frozen} | no memory | {1e3 * median(times[0]):.0f} | 1 |"]
    for (layout, depth), mine in zip(variants, times[1:], strict=True):
        ratios = sorted(with_memory / without for with_memory, without in zip(mine, times[0], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        lines.append(
            f"| {frozen} | {layout}, K = {depth} | {1e3 * median(mine):.0f} | "
            f"{median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
        )
    return lines


def main(words: Sequence[str]) -> int:
    if {"-h", "--help", "help"} & set(words):
        print(__doc__)
        return 0
    given = {"rounds": "15", "depth": "1,4,8", "layout": "end", "batch_size": "32", "threads": "1"}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in given:
            print(f"error: arguments are key=value with a key of {', '.join(given)}, got {word!r}", file=sys.stderr)
            return 2
        given[key] = text
    try:
        rounds, rows, threads = (int(given[key]) for key in ("rounds", "batch_size", "threads"))
        variants = [
            (layout, int(depth)) for layout in given["layout"].split(",") for depth in given["depth"].split(",")
        ]
        torch.set_num_threads(threads)
        print("| learns | memory | CPU ms per step | ratio to no memory (quartiles) |\n| --- | --- | --- | --- |")
        for frozen in FROZEN:
            print("\n".join(measure(frozen, variants, rows=rows, rounds=rounds)), flush=True)
    except (ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
