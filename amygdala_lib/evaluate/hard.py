"""Hard negatives: texts that could be taken for a concept and are not of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..corpus import Corpus
from ..corpus_files import HARD_KINDS
from .figures import times_drawn
from .splits import Split, membership_of

Wins = Float[np.ndarray, "concepts concepts"]


class HardNegatives:
    """The hard negatives of a corpus by kind, beside the held-out texts."""

    def __init__(self, corpus: Corpus, heldout: Split) -> None:
        self.tried = np.isin(np.arange(len(heldout.labels)), heldout.rows)
        self.positive = heldout.labels & self.tried[:, None]
        trained = set(corpus.texts)
        self.kinds = {}
        for kind in HARD_KINDS:
            texts = [t for t in corpus.hard_negatives if t.kind == kind and t.text not in trained]
            belongs = membership_of(corpus, texts)
            if (self.positive.any(0) & belongs.any(0)).any():
                self.kinds[kind] = belongs

    def figures(
        self, scores: Float[np.ndarray, "all_texts concepts"], *, draws: int, seed: int
    ) -> list[dict[str, Any]]:
        """A row per kind: AUROC of concepts' positives against hard and against other negatives.

        Each text counts by its z-score for its own concept (the one it could be taken for, for a
        hard negative), pooled over the concepts that have hard negatives of that kind. Intervals
        (95%) are from resampling these concepts.
        """
        found = []
        for kind, hard in self.kinds.items():
            shared = self.positive.any(0) & hard.any(0) & ~np.isnan(scores).all(0)
            if not shared.any():
                continue
            columns = np.flatnonzero(shared)
            own, rng = scores[:, columns], np.random.default_rng([seed, *kind.encode()])
            positive, hard = self.positive[:, columns], hard[:, columns]
            ordinary = self.tried[:, None] & ~positive
            drawn = times_drawn(len(columns), draws, rng)
            row = {"kind": kind, "n_concepts": len(columns)}
            row |= {"n_positives": int(positive.sum()), "n_hard": int(hard.sum())}
            for name, negative in (("auroc", hard), ("ordinary_auroc", ordinary)):
                row |= _pooled(own, positive, negative, drawn, name)
            found.append(row)
        return found


def _pooled(
    scores: Float[np.ndarray, "texts concepts"],
    positive: Bool[np.ndarray, "texts concepts"],
    negative: Bool[np.ndarray, "texts concepts"],
    drawn: Float[np.ndarray, "draws concepts"],
    name: str,
) -> dict[str, float]:
    """AUROC over all pairs of a positive and a negative, whatever concepts the two are of."""
    n_positive, n_negative = positive.sum(0), negative.sum(0)
    wins = np.zeros((len(n_positive), len(n_negative)))
    which, of = np.nonzero(positive)
    for column in range(len(n_negative)):
        below = np.sort(scores[negative[:, column], column])
        places = [np.searchsorted(below, scores[which, of], side) for side in ("left", "right")]
        np.add.at(wins[:, column], of, np.mean(places, axis=0))
    resampled = ((drawn @ wins) * drawn).sum(1) / ((drawn @ n_positive) * (drawn @ n_negative))
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = wins.sum() / (n_positive.sum() * n_negative.sum())
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
