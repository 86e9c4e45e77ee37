"""Movements that the jobs are made of, in surroundings, words and colours drawn at random: what a small base is
pretrained on. No job's sequence, instruction or cue is among them.
"""

from kuavo_sim.skills.drive import DriveAndPick, TurnAndPut
from kuavo_sim.skills.hand_over import HandOver
from kuavo_sim.skills.put import PutInBin, PutOnBox, PutOnMark, TakeFromBelt
from kuavo_sim.skills.shown import PutInShownColour, PutWhereShown
from kuavo_sim.tasks.task import Task

SKILLS: dict[str, type[Task]] = {
    skill.name: skill for skill in (PutOnMark, PutInBin, PutOnBox, TakeFromBelt, HandOver, DriveAndPick, TurnAndPut)
}

CUE_SKILLS: dict[str, type[Task]] = {skill.name: skill for skill in (PutWhereShown, PutInShownColour)}
"""Beside them for a base that meets a memory: each has a cue of its own."""
