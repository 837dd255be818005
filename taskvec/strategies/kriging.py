"""What a model would answer elsewhere, item by item, from what it answered at some coefficients.

The logit of the true class's probability is smooth in the coefficients, for every single item. So
it is interpolated item by item (universal kriging, Matheron 1969: a Gaussian kernel and a linear
trend), and a logistic curve, fitted to all answers seen, says how often an item of such a logit is
correct. That predicts the accuracy with its wiggles, which a curve through accuracies, or the mean
cross-entropy alone, cannot do.

Source: our own combination.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taskvec.answers import Answers
from taskvec.search import Level

Floats = npt.NDArray[np.float64]

LENGTH = 0.4  # of the kernel, as a share of a range, times the root of the number of coefficients
NUGGET = 1e-3  # variance of what the kernel does not explain, as a share
CLIP = 8.0  # logits beyond this say nothing more
ROUNDS = 25
RIDGE = 1.0


def predicted(
    places: Sequence[Floats], answers: Sequence[Answers], where: Floats, sizes: Sequence[int]
) -> list[Level]:
    """Return how the model would do on a task at other coefficients.

    Args:
        places: m places of (K,) coefficients, scaled to [0, 1], where the model was asked.
        answers: m times the answers on the task's first chunks.
        where: (G, K) places to predict.
        sizes: items of each of the task's chunks.
    """
    points = np.stack(places)
    curve = _curve(answers)
    correct, losses, items = np.zeros(len(where)), np.zeros(len(where)), 0
    for stop in np.cumsum(sizes):
        asked = [i for i, found in enumerate(answers) if len(found) >= stop]
        if not asked:
            break
        part = slice(items, int(stop))
        weights = interpolation(points[asked], where)
        loss = np.stack([answers[i].loss[part] for i in asked]).astype(np.float64)
        correct += _sigmoid(curve[0] + curve[1] * (weights @ _logits(loss))).sum(axis=1)
        losses += weights @ loss.sum(axis=1)
        items = int(stop)
    return [
        Level(float(right / items), max(0.0, float(loss / items)))
        for right, loss in zip(correct, losses, strict=True)
    ]


def interpolation(points: Floats, where: Floats) -> Floats:
    """Return the weights of values at (m, K) points in the values at (G, K) places, (G, m)."""
    number, dimensions = points.shape
    length = LENGTH * np.sqrt(dimensions)
    inverse = np.linalg.inv(_kernel(points, points, length) + NUGGET * np.eye(number))
    kernel = _kernel(where, points, length)
    linear = number > dimensions
    trend, wanted = (
        np.column_stack([np.ones(len(at)), at]) if linear else np.ones((len(at), 1))
        for at in (points, where)
    )
    fit = np.linalg.pinv(trend.T @ inverse @ trend) @ trend.T @ inverse
    result: Floats = kernel @ inverse @ (np.eye(number) - trend @ fit) + wanted @ fit
    return result


def _kernel(left: Floats, right: Floats, length: float) -> Floats:
    squares = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=2)
    result: Floats = np.exp(-0.5 * squares / length**2)
    return result


def _logits(loss: Floats) -> Floats:
    """Return log(p / (1 - p)) for p = exp(-loss), within bounds."""
    with np.errstate(divide="ignore"):
        odds = -loss - np.log(-np.expm1(-loss))
    return np.clip(odds, -CLIP, CLIP)


def _sigmoid(x: Floats) -> Floats:
    result: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return result


def _curve(answers: Sequence[Answers]) -> tuple[float, float]:
    """Return intercept and slope of the logistic regression of correct on logit, by Newton."""
    z = _logits(np.concatenate([found.loss for found in answers]).astype(np.float64))
    y = np.concatenate([found.correct for found in answers]).astype(np.float64)
    prior = np.array([0.0, 1.0])
    at = prior.copy()
    for _ in range(ROUNDS):
        p = _sigmoid(at[0] + at[1] * z)
        w = p * (1 - p)
        slope = np.array([(y - p).sum(), ((y - p) * z).sum()]) - RIDGE * (at - prior)
        bend = np.array([[w.sum(), (w * z).sum()], [(w * z).sum(), (w * z * z).sum()]])
        at = at + np.linalg.solve(bend + RIDGE * np.eye(2), slope)
    return float(at[0]), float(at[1])
