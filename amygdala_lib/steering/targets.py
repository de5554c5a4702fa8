"""Targets: how much a text shows what was pushed toward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from ..directions import Directions
from ..errors import SteeringError
from .pushes import Push
from .trials import Trial

Score = Callable[[list[str], str], Sequence[float]]
"""(continuations, concept) -> how much each shows it, from 0 to 1; NaN if one cannot tell."""

Target = Callable[[Trial, Push], tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"]]]
"""How much each text of a trial shows what was pushed toward, from 0 to 1, and a finer measure of
the same, to follow a dose with. Of several concepts, it is the one that shows least."""

_EXTREME = 0.95
"""A text shows a concept if its reading is beyond this share of the unsteered texts' readings."""


def target_by_reading(directions: Directions, unsteered: Trial) -> Target:
    """1 for texts whose reading is beyond nearly all unsteered ones'; finer, the z-scores.

    Raises SteeringError if nothing was written.
    """
    if not any(unsteered.ids):
        raise SteeringError("the model wrote nothing after any prompt: give other prompts")
    low, high = np.nanquantile(unsteered.readings, [1 - _EXTREME, _EXTREME], axis=0)

    @cache
    def target(trial: Trial, push: Push) -> tuple[np.ndarray, np.ndarray]:
        shown, levels = [], []
        for concept, weight in push.weights.items():
            column = directions.index(concept)
            z = trial.readings[:, column]
            shown.append(z > high[column] if weight > 0 else z < low[column])
            levels.append(math.copysign(1, weight) * z)
        return np.min(shown, axis=0).astype(float), np.min(levels, axis=0)

    return target


def target_by_score(score: Score) -> Target:
    """What a function of the continuations says; 1 minus that for a negative weight.

    Each trial is shown to it once for each concept, for it may be a judge that takes its time. The
    target raises SteeringError if it gives anything but a number from 0 to 1 or NaN for each text.
    """

    @cache
    def target(trial: Trial, push: Push) -> tuple[np.ndarray, np.ndarray]:
        scores = []
        for concept, weight in push.weights.items():
            given = np.asarray(score(trial.texts, concept), float)
            if given.shape != (len(trial.texts),) or ((given < 0) | (given > 1)).any():
                raise SteeringError(
                    f"score gave {given!r} for {len(trial.texts)} texts and {concept!r}: it must "
                    "give a number from 0 to 1 for each text (NaN: cannot tell)"
                )
            scores.append(given if weight > 0 else 1 - given)
        least = np.min(scores, axis=0)
        return least, least

    return target
