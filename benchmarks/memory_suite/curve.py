"""A learning curve in decisions: `strategy=decisions` counts them at every validation, and changes nothing."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lerobot.policies.factory import make_pre_post_processors

from benchmarks.memory_suite.data import held_out
from benchmarks.memory_suite.decisions import decide, probe_of
from kuavo_train.data.normalization import Normalization
from kuavo_train.metrics.intervals import Scores
from kuavo_train.runs.files import JsonLines
from kuavo_train.runs.run_folder import StageFolder
from kuavo_train.strategies.strategy import Action, StageView, Strategy


@dataclass(frozen=True)
class Settings:
    decisions: int = 32  # about as many episodes, each time the same


def curve_of(folder: StageFolder) -> JsonLines:
    """Lines of step, decisions right and made, and the CPU seconds of the process until then."""
    return JsonLines(folder.path / "decisions.jsonl")


class DecisionCurve(Strategy):
    Settings = Settings

    def decide(self, view: StageView, scores: Mapping[str, Scores], *, step: int, epoch: int, over: bool) -> Action:
        policy: Any = view.policy
        was_training = policy.training
        episodes = held_out(view.config.stage.name, "curve", self.settings.decisions)
        normalization = Normalization.load(view.config.run_folder / "normalization.json")
        preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=normalization.for_lerobot())
        found = decide(probe_of(policy, preprocessor, normalization, episodes), normalization, episodes)["on"]
        policy.train(was_training)
        curve = curve_of(view.folder)
        curve.forget(lambda line: line["step"] >= step)  # of a process that was killed after it
        curve.append(
            {"step": step, "right": found["right"], "n": found["n"], "cpu_seconds": round(time.process_time(), 1)}
        )
        return Action()
