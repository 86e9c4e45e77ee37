"""Which source a task's cues have."""

from kuavo_train.data.normalization import Normalization
from kuavo_train.data.task import Task
from kuavo_train.probing.cue_source import CueSource, NoCues
from kuavo_train.probing.recorded_cues import RecordedCues
from kuavo_train.probing.simulated_cues import SimulatedCues, has_cues


def cue_source(task: Task, taught: Task, normalization: Normalization, stride: int) -> CueSource:
    """A column of the dataset goes before what kuavo_sim recorded beside it.

    Args:
        taught: the task as it was trained, with the episodes that recorded answers are compared with.
        stride: frames between queries.
    """
    if task.cues is not None and taught.cues is not None:
        return RecordedCues(task, taught, normalization, stride)
    if has_cues(task):
        return SimulatedCues(task, normalization, stride)
    return NoCues()
