"""What became of a task, in a word: from how its success and its held-out loss changed since it was learnt.

Success decides where the policy was rolled out, on the same layouts then and now; the loss's verdict stands beside it.
"""

from dataclasses import dataclass

from kuavo_train.metrics.intervals import Interval, PairedOutcomes
from kuavo_train.metrics.number_format import integer, whole_percent

WELL_RETAINED = "well retained"


SLIGHT_DEGRADATION = "slight degradation"


SIGNIFICANT_FORGETTING = "significant forgetting"


VERDICTS = (WELL_RETAINED, SLIGHT_DEGRADATION, SIGNIFICANT_FORGETTING)


@dataclass(frozen=True)
class RetentionLimits:
    """When a task counts as kept. A change is relative to the held-out loss when it was learnt: 0.1 is 10 % more.

    A drop is of the share of layouts that succeed: 0.1 is from 90 % to 80 %.

    Raises:
        ValueError: naming the field, its rule and the value.
    """

    well_retained_change: float = 0.10  # up to this change a task is well retained
    slight_change: float = 0.30  # up to this one slightly degraded, beyond it forgotten
    well_retained_drop: float = 0.10  # the same of the drop in success, which decides where there are rollouts
    slight_drop: float = 0.30  # as above
    well_retained_loss: float = 0.7  # the same limits on the loss itself, shown beside; it depends on data and model
    slight_loss: float = 1.0  # as above
    confidence: float = 0.95  # level of the intervals
    resamples: int = 10_000  # of the episodes, that the intervals are from

    def __post_init__(self) -> None:
        for name in ("change", "drop", "loss"):
            well_retained, slight = getattr(self, f"well_retained_{name}"), getattr(self, f"slight_{name}")
            if not 0 <= well_retained <= slight:
                raise ValueError(f"well_retained_{name} must be in [0, slight_{name} = {slight}], got {well_retained}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")

    @property
    def rule(self) -> str:
        """The rule of `judge`, in words for a report."""
        return (
            "By its loss, a task's verdict follows from how much its held-out loss has risen since the stage that "
            f"learnt it, as a share of the loss then. The lower end of the {whole_percent(self.confidence)} interval "
            f"(paired bootstrap over held-out episodes, {integer(self.resamples)} resamples) decides: at most "
            f"{whole_percent(self.well_retained_change)} is '{WELL_RETAINED}', at most "
            f"{whole_percent(self.slight_change)} '{SLIGHT_DEGRADATION}', more '{SIGNIFICANT_FORGETTING}'. So a task "
            "is called forgotten only when the data show it; where the upper end would give another verdict, both are "
            "shown, and the verdict is not settled."
        )

    @property
    def success_rule(self) -> str:
        """The rule of `judge_success`, in words for a report."""
        return (
            "Where the policy was rolled out, a task's verdict follows from its success, on the same layouts when it "
            "was learnt and now. The drop has Newcombe's paired "
            f"{whole_percent(self.confidence)} interval, in points. A drop of at most "
            f"{whole_percent(self.well_retained_drop)} is '{WELL_RETAINED}', at most "
            f"{whole_percent(self.slight_drop)} '{SLIGHT_DEGRADATION}', more '{SIGNIFICANT_FORGETTING}'. The lower end "
            "of the interval decides, and only where McNemar's exact test shows a drop at all "
            f"(p < {1 - self.confidence:.3g}); where the upper end would give another verdict, the verdict is not "
            "settled. A task that never succeeded when it was learnt has nothing to lose, and no verdict."
        )


@dataclass(frozen=True)
class Verdict:
    """What the interval's lower end says (`word`) and what its upper end says (`worst`), of the three words above.

    Without an interval `word` is the estimate's and `worst` None.
    """

    word: str
    worst: str | None

    @property
    def settled(self) -> bool:
        return self.word == self.worst


def judge(relative_change: Interval, limits: RetentionLimits) -> Verdict:
    """Verdict on one task from the relative change of its loss since learnt, by `RetentionLimits.rule`.

    Without an interval (one episode) the estimate decides and the verdict is never settled.
    """

    def word(change: float) -> str:
        if change <= limits.well_retained_change:
            return WELL_RETAINED
        return SLIGHT_DEGRADATION if change <= limits.slight_change else SIGNIFICANT_FORGETTING

    if relative_change.low is None or relative_change.high is None:
        return Verdict(word(relative_change.estimate), None)
    return Verdict(word(relative_change.low), word(relative_change.high))


def judge_success(outcomes: PairedOutcomes, limits: RetentionLimits) -> Verdict | None:
    """Verdict on one task from its success when learnt and now, by `RetentionLimits.success_rule`.

    None where it did not succeed once when learnt.
    """
    if not outcomes.both + outcomes.only_first:
        return None
    change = outcomes.difference(level=limits.confidence)
    assert change.low is not None
    assert change.high is not None

    def word(drop: float) -> str:
        if drop <= limits.well_retained_drop:
            return WELL_RETAINED
        return SLIGHT_DEGRADATION if drop <= limits.slight_drop else SIGNIFICANT_FORGETTING

    shown = outcomes.p_value < 1 - limits.confidence
    return Verdict(word(-change.high) if shown else WELL_RETAINED, word(-change.low))


def judge_absolute(loss: float, limits: RetentionLimits) -> str:
    """The older, secondary verdict from the loss alone."""
    if loss < limits.well_retained_loss:
        return WELL_RETAINED
    return SLIGHT_DEGRADATION if loss < limits.slight_loss else SIGNIFICANT_FORGETTING
