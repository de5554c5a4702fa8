"""Do a concept's texts point the same way, and which ones do not?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


class Agreement(NamedTuple):
    """How much each concept's texts agree, each (concepts,) float32."""

    cosine: Float[Tensor, " concepts"]
    """Mean cosine between two of the concept's texts, seen from the mean of all texts."""
    by_chance: Float[Tensor, " concepts"]
    """What 99 in 100 random sets of as many texts stay below."""
    reliability: Float[Tensor, " concepts"]
    """Expected cosine^2 of the mean of n such texts with the mean of endlessly many."""
    wanted: Float[Tensor, " concepts"]
    """Texts at which `reliability` would be `RELIABLE`; infinite if they do not agree at all."""


RELIABLE = 0.8


def agreement(
    acts: Float[Tensor, "texts hidden"],
    belongs: Float[Tensor, "concepts texts"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Mean cosine r between a concept's texts, against chance, and what it says of their number.

    Reliability is n r / (1 + (n - 1) r), the Spearman-Brown formula, with negative r taken as 0.
    A concept with one text has a cosine of NaN.
    """
    units = normalize(acts - acts.mean(0), dim=1)
    counts = belongs.sum(1)
    cosine = _mean_cosine(units, belongs)
    generator = torch.Generator().manual_seed(seed)
    by_chance = torch.full_like(cosine, torch.nan)
    for n in counts.unique().tolist():
        if n > 1:
            order = torch.rand(draws, len(acts), generator=generator).argsort(1)
            random = torch.zeros(draws, len(acts)).scatter_(1, order[:, : int(n)], 1.0)
            by_chance[counts == n] = _mean_cosine(units, random).quantile(0.99)
    r = cosine.nan_to_num(0).clamp(min=0)
    return Agreement(
        cosine=cosine,
        by_chance=by_chance,
        reliability=counts * r / (1 + (counts - 1) * r),
        wanted=RELIABLE * (1 - r) / ((1 - RELIABLE) * r),
    )


def alignment(
    acts: Float[Tensor, "texts hidden"],
    positives: Float[Tensor, " texts"],
    vector: Float[Tensor, " hidden"],
) -> Float[Tensor, " positives"]:
    """Cosine of each positive, seen from the mean of the negatives, with a unit direction.

    `positives` is 1 for the concept's texts, 0 for others. A text near or below 0 may be
    mislabelled or off its topic; even a stray one has a little, since the direction was made with
    it.
    """
    chosen = positives > 0
    return normalize(acts[chosen] - acts[~chosen].mean(0), dim=1) @ vector


def _mean_cosine(
    units: Float[Tensor, "texts hidden"], sets: Float[Tensor, "sets texts"]
) -> Float[Tensor, " sets"]:
    """Over all pairs of different texts of each set, from the norm of their sum; NaN for one."""
    n = sets.sum(1)
    pairs = torch.where(n > 1, n * (n - 1), torch.nan)
    return ((sets @ units).square().sum(1) - n) / pairs
