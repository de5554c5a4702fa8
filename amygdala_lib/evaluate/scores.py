"""Scores: texts projected on directions, in standard deviations of the texts these were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..capture import Activations
from ..directions import Directions, Spectral, methods, text_means
from ..errors import AmygdalaError
from .figures import auroc
from .splits import Part, Split


def separation(
    directions: Directions, acts: Activations, labels: Sequence[str | None]
) -> pd.DataFrame:
    """AUROC of each concept (row) at each layer (column), one label per text of `acts`."""
    positive = np.array(labels, dtype=object)[:, None] == np.array(directions.concepts, object)
    columns = {
        layer: auroc((text_means(acts, layer) @ directions.vectors[layer].T).numpy(), positive)
        for layer in directions.layers
    }
    return pd.DataFrame(columns, index=pd.Index(directions.concepts, name="concept"))


@dataclass(frozen=True, eq=False)
class Reader:
    """One method at one layer: extracts directions from a part of the texts and scores texts.

    `values` are one vector per text; `held` is what the method reads, tokens or the same vectors.
    """

    method: str
    concepts: Sequence[str]
    values: Float[Tensor, "texts hidden"]
    held: Float[Tensor, "texts hidden"] | list[Float[Tensor, "tokens hidden"]]
    options: Mapping[str, Any]

    @classmethod
    def at(
        cls,
        layer: int,
        method: str,
        acts: Activations,
        values: Float[Tensor, "texts hidden"],
        concepts: Sequence[str],
        options: Mapping[str, Any],
    ) -> Reader:
        reads_tokens = methods[method].reads_tokens
        held = [tokens.float() for tokens in acts[layer]] if reads_tokens else values
        here = {k: v[layer] if isinstance(v, Activations) else v for k, v in options.items()}
        return cls(method, concepts, values, held, here)

    def fit(self, part: Part) -> Float[Tensor, "concepts hidden"]:
        """Unit vectors, as `extract` gives them; NaN for concepts the part has no direction for."""
        rows = torch.from_numpy(part.rows)
        held = self.held[rows] if isinstance(self.held, Tensor) else [self.held[r] for r in rows]
        raw = methods[self.method].function(held, part.corpus, **self.options)
        raw = raw.vectors if isinstance(raw, Spectral) else raw
        shape = (len(part.corpus.concepts), self.values.shape[1])
        if raw.shape != shape:
            raise AmygdalaError(
                f"{self.method} gave {tuple(raw.shape)}, not (concepts, hidden), which is {shape} "
                "here"
            )
        found = torch.full((len(self.concepts), shape[1]), torch.nan)
        column_of = {name: column for column, name in enumerate(self.concepts)}
        # 0 / 0 is NaN, which is what a row of zeros stands for.
        units = raw.float() / raw.float().norm(dim=1, keepdim=True)
        found[[column_of[name] for name in part.corpus.concepts]] = units
        found[~found.isfinite().all(1)] = torch.nan
        return found

    def score(
        self,
        vectors: Float[Tensor, "concepts hidden"],
        training: Part,
        rows: Int[np.ndarray, " texts"],
    ) -> Float[np.ndarray, "texts concepts"]:
        """z-scores of these rows, by the mean and deviation of the training texts alone."""
        centre = self.values[training.rows].mean(0)
        trained = (self.values[training.rows] - centre) @ vectors.T
        tried = (self.values[rows] - centre) @ vectors.T
        deviation = trained.std(0)
        return (tried / torch.where(deviation == 0, 1, deviation)).numpy()

    def try_on(
        self, split: Split, everything: Part, of_everything: Float[Tensor, "concepts hidden"]
    ) -> Float[np.ndarray, "texts concepts"]:
        """z-scores of `split.rows`, in each fold by directions of its training part.

        `of_everything` are the directions of all training texts, which need not be fitted again.
        """
        found = []
        for fold in split.folds:
            whole = np.array_equal(fold.training.rows, everything.rows)
            vectors = of_everything if whole else self.fit(fold.training)
            found.append(self.score(vectors, fold.training, fold.test))
        return np.concatenate(found)


def one_vector_per_text(acts: Activations) -> Activations:
    """The same activations as methods that do not read tokens want them: the mean of the tokens."""
    if acts.pool != "tokens":
        return acts
    means = {layer: text_means(acts, layer) for layer in acts.layers}
    return replace(acts, pool="mean", tokens=None, _by_layer=means)
