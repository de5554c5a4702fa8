"""Baselines: what words alone tell, and what directions of chance do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from ..directions import membership
from .figures import auroc, auroc_of_each
from .scores import Reader
from .splits import Part, Split


class Words:
    """A bag of words: a ridge classifier on TF-IDF of words and word pairs, one concept each."""

    def __init__(self, texts: Sequence[str], concepts: Sequence[str]) -> None:
        counter = CountVectorizer(
            ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", dtype=np.float32
        )
        self.counts = counter.fit_transform(texts)
        self.concepts = concepts

    def score(
        self, training: Part, rows: Int[np.ndarray, " texts"]
    ) -> Float[np.ndarray, "texts concepts"]:
        """Scores of these rows, learnt from the training part; NaN for concepts it has no text of.

        Words that are not in the training part count for nothing. In its dual form one
        decomposition serves all concepts.
        """
        known = self.counts[training.rows].getnnz(0) > 0
        weights = TfidfTransformer(sublinear_tf=True)
        features = weights.fit_transform(self.counts[training.rows][:, known])
        targets = membership(training.corpus).T.numpy()
        # The kernel has no intercept, so the targets do without the share that every text has.
        ridge = KernelRidge(alpha=1.0).fit(features, targets - targets.mean(0))
        found = np.full((len(rows), len(self.concepts)), np.nan)
        column_of = {name: column for column, name in enumerate(self.concepts)}
        columns = [column_of[name] for name in training.corpus.concepts]
        found[:, columns] = ridge.predict(weights.transform(self.counts[rows][:, known]))
        return found

    def try_on(self, split: Split) -> Float[np.ndarray, "texts concepts"]:
        """Scores of `split.rows`, in each fold learnt from its own training part."""
        return np.concatenate([self.score(fold.training, fold.test) for fold in split.folds])


def random_directions(
    values: Float[Tensor, "texts hidden"], draws: int, seed: int
) -> Float[Tensor, "draws hidden"]:
    """Unit vectors drawn with the covariance of the activations.

    Spread as real differences are: most of a residual stream's variance is in few directions, and
    uniform ones would hardly meet them.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(draws, len(values), generator=generator)
    return torch.nn.functional.normalize(weights @ (values - values.mean(0)))


def random_aurocs(
    values: Float[Tensor, "texts hidden"],
    directions: Float[Tensor, "draws hidden"],
    split: Split,
) -> Float[np.ndarray, "draws concepts"]:
    """The AUROC of each random direction for each concept, on the texts of a split."""
    tried = values[split.rows]
    scores = (tried - tried.mean(0)) @ directions.T
    return auroc_of_each(scores.numpy(), split.positive)


def shuffled_aurocs(
    reader: Reader, split: Split, repeats: int, seed: int
) -> Float[np.ndarray, "repeats concepts"]:
    """The AUROC of directions extracted with the training labels dealt out anew.

    On the test texts of the first fold, whose labels are left as they are.
    """
    rng = np.random.default_rng([seed, *split.name.encode()])
    fold, found = split.folds[0], []
    for _ in range(repeats):
        dealt = Part(rng.permutation(fold.training.rows), fold.training.corpus)
        scores = reader.score(reader.fit(dealt), dealt, fold.test)
        found.append(auroc(scores, split.labels[fold.test]))
    return np.array(found)
