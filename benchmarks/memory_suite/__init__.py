"""Is a memory learnt where it matters? Cues that nobody tuned for, trained by `python -m kuavo_train` itself.

Every task shows a cue, hides it behind clutter, and demands it at a mark (layouts.py). Every task is trained in three
situations:

    nothing   from new weights; everything learns
    twin      the memory joins a policy that was trained on the same data without; everything learns
    frozen    the same, with vision, connector and text model frozen as the robot profile has them

Policies are then evaluated in layouts that were never trained on, at trained delays and at twice the longest: with
their memory on, reset, frozen after the cue, and swapped with that of another episode, the donor.
"""
