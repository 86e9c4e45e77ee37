"""The tasks by name, in the order in which they are learnt."""

from kuavo_sim.tasks.moving_grasp import MovingGrasp
from kuavo_sim.tasks.placement import Placement
from kuavo_sim.tasks.sorting import Sorting
from kuavo_sim.tasks.task import Task
from kuavo_sim.tasks.weighing import Weighing

TASKS: dict[str, type[Task]] = {task.name: task for task in (MovingGrasp, Weighing, Placement, Sorting)}
