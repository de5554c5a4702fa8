"""Spectrum: does a concept have one direction, or a spread of them?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .capture import Activations
from .corpus import Corpus
from .directions import Directions, text_means
from .errors import AmygdalaError


def variances(deltas: Float[Tensor, "n hidden"]) -> Float[Tensor, " components"]:
    """Variance along each principal component, descending: min(n - 1, hidden) of them.

    Raises ValueError if n < 2 (no variance to speak of).
    """
    if len(deltas) < 2:
        raise ValueError(f"{len(deltas)} texts have no variance: give at least 2")
    singular_values = torch.linalg.svdvals(deltas.float() - deltas.float().mean(0))
    return singular_values[: len(deltas) - 1].square() / (len(deltas) - 1)


def first_pc_ratio(deltas: Float[Tensor, "n hidden"]) -> float:
    """Share of variance along the first principal component of centred deltas.

    Near 1: the texts differ along one direction only. Below 0.4: the concept is fragmented. Few
    texts in many dimensions always give more than 1 / (n - 1). Raises ValueError if n < 2.
    """
    found = variances(deltas)
    return float(found[0] / found.sum())


def components_for(share: float, variances: Float[Tensor, " components"]) -> int:
    """The fewest leading components that hold `share` of the variance."""
    cumulative = variances.cumsum(0) / variances.sum()
    return min(int((cumulative < share - 1e-6).sum()) + 1, len(variances))


def effective_dimension(variances: Float[Tensor, " components"]) -> float:
    """The participation ratio (sum lambda)^2 / sum lambda^2: how many components share evenly."""
    return float(variances.sum() ** 2 / variances.square().sum())


@dataclass(frozen=True, eq=False)
class Spectrum:
    """How the texts of each concept spread, per layer.

    `variances[layer]` is (n_concepts, components) float32, descending, NaN where a concept has
    fewer texts. `eigenvalues[layer]`, the largest of M_pos - M_base, are there for the method
    `subspace`: the first far above the second says one direction, close together a shared spread.
    """

    concepts: list[str]
    variances: dict[int, Float[Tensor, "concepts components"]]
    eigenvalues: dict[int, Float[Tensor, "concepts n"]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted(self.variances)

    def shares(self, layer: int) -> pd.DataFrame:
        """Share of the variance by concept (row) and component (column, from 1)."""
        held = self.variances[layer]
        shares = (held / held.nansum(1, keepdim=True)).numpy()
        columns = pd.RangeIndex(1, shares.shape[1] + 1, name="component")
        return pd.DataFrame(shares, index=pd.Index(self.concepts, name="concept"), columns=columns)

    def to_frame(self) -> pd.DataFrame:
        """The figures of each concept and layer; NaN for a concept with a single text.

        `first_pc_ratio`; `k_signal_at_90pct`, components to 90% of the variance;
        `effective_dim_signal`, the participation ratio over those, and `effective_dim_full` over
        all; `noise_inflation`, how many times the tail inflates the count; `eigenvalue_gap`, the
        first of the subspace eigenvalues over the second.
        """
        rows = {
            (concept, layer): _figures(self.variances[layer][row]) | self._gap(layer, row)
            for layer in self.layers
            for row, concept in enumerate(self.concepts)
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(frame.index, names=["concept", "layer"])
        return frame

    def _gap(self, layer: int, row: int) -> Mapping[str, float]:
        if layer not in self.eigenvalues:
            return {}
        first, second = self.eigenvalues[layer][row, :2].tolist()
        return {"eigenvalue_gap": first / second if second > 0 else np.inf}


def spectrum(acts: Activations, corpus: Corpus, directions: Directions) -> Spectrum:
    """The spectrum of each concept's texts at each layer of `directions`.

    Raises AmygdalaError if `acts` are of other texts than `corpus`, or lack a layer.
    """
    if acts.texts != corpus.texts:
        raise AmygdalaError(
            "the activations are of other texts than the corpus: run capture(lm, corpus) on it"
        )
    found = {}
    for layer in directions.layers:
        held = text_means(acts, layer)
        rows = [held[corpus.positives(concept)] for concept in directions.concepts]
        widest = max(1, min(max(map(len, rows)) - 1, held.shape[1]))
        table = torch.full((len(rows), widest), torch.nan)
        for row, positives in enumerate(rows):
            if len(positives) > 1:
                values = variances(positives)
                table[row, : len(values)] = values
        found[layer] = table
    return Spectrum(list(directions.concepts), found, dict(directions.eigenvalues))


def _figures(padded: Float[Tensor, " components"]) -> dict[str, Any]:
    held = padded[padded.isfinite()]
    if not held.sum() > 0:
        nothing = ("first_pc_ratio", "k_signal_at_90pct", "effective_dim_signal",
                   "effective_dim_full", "noise_inflation")  # fmt: skip
        return dict.fromkeys(nothing, np.nan)
    k = components_for(0.9, held)
    signal, full = effective_dimension(held[:k]), effective_dimension(held)
    return {
        "first_pc_ratio": float(held[0] / held.sum()),
        "k_signal_at_90pct": k,
        "effective_dim_signal": signal,
        "effective_dim_full": full,
        "noise_inflation": full / signal,
    }
