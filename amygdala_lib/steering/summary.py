"""Summary: the trials of a sweep, summed up by concept, layer, strength and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from ..directions import Directions
from ..evaluate.figures import over_concepts, share_interval
from .pushes import Key, Push
from .targets import Target
from .trials import Trial

_DRAWS = 1000
"""Bootstrap samples."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What was tried, and by split the numbers of its prompts."""

    directions: Directions
    pushes: Sequence[Push]
    layers: Sequence[int]
    strengths: Sequence[float]
    controls: Sequence[str]
    unsteered: Trial
    trials: Mapping[Key, Trial]
    target: Target
    splits: Mapping[str, Int[np.ndarray, " texts"]]

    def cells(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """The cells of a sweep, the shifts of all readings there, and those of random pushes."""
        cells, shifts, random_shifts = [], [], []
        for push, layer, strength in product(self.pushes, self.layers, self.strengths):
            trial = self.trials[push.label, layer, strength]
            reach = push.reach(self.directions, layer, strength)
            random = [self.trials[name, layer, reach] for name in self.controls]
            for split, rows in self.splits.items():
                place = {"concept": push.label, "layer": layer, "strength": strength}
                cells.append(place | {"split": split} | self._cell(push, trial, random, rows))
                shifts.append(self._shift(trial, rows))
                moved = [self._shift(other, rows) for other in random]
                random_shifts.append(np.sqrt(_mean_of(np.square(moved), shifts[-1].shape)))
        columns = pd.Index(self.directions.concepts, name="concept")
        return (
            pd.DataFrame(cells),
            pd.DataFrame(np.stack(shifts), columns=columns),
            pd.DataFrame(np.stack(random_shifts), columns=columns),
        )

    def doses(self, seed: int) -> pd.DataFrame:
        """How steadily the target follows the strength, by concept, layer and split."""
        doses, found = np.array([0.0, *self.strengths]), []
        for push, layer in product(self.pushes, self.layers):
            tried = [self.trials[push.label, layer, strength] for strength in self.strengths]
            levels = np.stack([self.target(t, push)[1] for t in [self.unsteered, *tried]], axis=1)
            rho = _rank_correlations(doses, levels)
            for split, rows in self.splits.items():
                low, high = over_concepts(rho[rows], np.mean, draws=_DRAWS, seed=seed)
                row = {"concept": push.label, "layer": layer, "split": split}
                found.append(row | {"rho": _mean(rho[rows]), "rho_low": low, "rho_high": high})
        return pd.DataFrame(found)

    def written(self, prompts: Sequence[str]) -> pd.DataFrame:
        """Every text, first those without steering."""
        split = {int(row): name for name, rows in self.splits.items() for row in rows}
        frames = []
        for key, trial in {("", np.nan, 0.0): self.unsteered, **self.trials}.items():
            label, layer, strength = key
            texts = {
                "concept": label,
                "layer": float(layer),
                "strength": float(strength),
                "split": [split[row] for row in range(len(prompts))],
                "prompt": list(prompts),
                "text": trial.texts,
                "perplexity": [trial.only([row]).perplexity for row in range(len(prompts))],
            }
            frames.append(pd.DataFrame(texts))
        return pd.concat(frames, ignore_index=True)

    def _cell(
        self,
        push: Push,
        trial: Trial,
        random: Sequence[Trial],
        rows: Int[np.ndarray, " texts"],
    ) -> dict[str, float]:
        base, steered = self.unsteered.only(rows), trial.only(rows)
        shown = self.target(trial, push)[0][rows]
        by_chance = [_mean(self.target(other, push)[0][rows]) for other in random]
        low, high = share_interval(_mean(shown), np.count_nonzero(~np.isnan(shown)))
        ratios = [other.only(rows).perplexity / base.perplexity for other in random]
        return {
            "n_texts": len(rows),
            "target": _mean(shown),
            "target_low": low,
            "target_high": high,
            "base": _mean(self.target(self.unsteered, push)[0][rows]),
            "random_target": float(_mean_of(by_chance)),
            "random_low": min(by_chance, default=np.nan),
            "random_high": max(by_chance, default=np.nan),
            "perplexity_ratio": steered.perplexity / base.perplexity,
            "random_perplexity": float(_mean_of(ratios)),
            "distinct_sentences": steered.distinct_sentences,
            "base_sentences": base.distinct_sentences,
            "distinct_bigrams": steered.distinct_bigrams,
            "base_bigrams": base.distinct_bigrams,
        }

    def _shift(
        self, trial: Trial, rows: Int[np.ndarray, " texts"]
    ) -> Float[np.ndarray, " concepts"]:
        """Mean over the prompts after which something was written both times."""
        moved = (trial.readings - self.unsteered.readings)[rows]
        return _mean_of(moved[~np.isnan(moved).any(axis=1)], moved.shape[1:])


def _rank_correlations(
    doses: Float[np.ndarray, " doses"], levels: Float[np.ndarray, "texts doses"]
) -> Float[np.ndarray, " texts"]:
    """Spearman's rho of each row with the doses; 0 if a row is constant, NaN if it has a gap."""
    x = rankdata(doses) - (len(doses) + 1) / 2
    y = rankdata(levels, axis=1, nan_policy="propagate") - (len(doses) + 1) / 2
    spread = np.sqrt((x**2).sum() * (y**2).sum(axis=1))
    return np.where(spread == 0, 0.0, y @ x / np.where(spread == 0, 1.0, spread))


def _mean(values: Float[np.ndarray, " n"]) -> float:
    """Of those that are numbers; NaN if none is."""
    return float(_mean_of(values[~np.isnan(values)]))


def _mean_of(rows: Sequence, shape: tuple[int, ...] = ()) -> np.ndarray:
    """The mean row; NaN, of this shape, if there is none."""
    return np.mean(rows, axis=0) if len(rows) else np.full(shape, np.nan)
