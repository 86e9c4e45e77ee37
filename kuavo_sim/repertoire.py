"""All that can be simulated by name: the four jobs and the skills."""

from kuavo_sim.skills import CUE_SKILLS, SKILLS
from kuavo_sim.tasks import TASKS
from kuavo_sim.tasks.task import Task

REPERTOIRE: dict[str, type[Task]] = {**TASKS, **SKILLS, **CUE_SKILLS}
