"""What can be read from features: a linear probe, and the nearest of several."""

import numpy as np

PROBE_RIDGE = 1.0  # per sample, on features of unit variance


def nearest(predicted: np.ndarray, references: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[E] which of R references each prediction is nearest to, by the Euclidean distance over the valid entries.

    Args:
        predicted: [E, C, A]. references: [E, R, C, A]. valid: [E, C, A] bool.
    """
    difference = (references - predicted[:, None]) * valid[:, None]
    return np.square(difference, dtype=np.float64).sum(axis=(2, 3)).argmin(axis=1)


def linear_probe(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """[T] what a linear classifier reads from `held_out` [T, F] after fitting `features` [N, F], `labels` [N].

    Ridge regression of the one-hot labels, on features standardized by those it is fitted on.
    """
    mean, std = features.mean(axis=0), features.std(axis=0)
    x, t = ((values - mean) / np.maximum(std, 1e-6) for values in (features, held_out))
    classes = np.unique(labels)
    targets = (labels[:, None] == classes).astype(np.float64)
    offset = targets.mean(axis=0)
    ridge = PROBE_RIDGE * len(x) * np.eye(len(x))  # the dual form: far fewer samples than features
    weights = x.T @ np.linalg.solve(x @ x.T + ridge, targets - offset)
    return classes[(t @ weights + offset).argmax(axis=1)]
