"""Sizes of the policy and of the batches in these tests."""

STATE_DIM, ACTION_DIM, CHUNK = 5, 4, 6
CAMERAS = ("observation.images.head", "observation.images.wrist")
LANGUAGE_LENGTH = 7
PREFIX_LENGTH = len(CAMERAS) * 1 + LANGUAGE_LENGTH + 1  # one token per camera, language, state
