"""`pca`, `mean`, `logistic`, `logistic_l1`: the aggregators of the steering-vectors library."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from ..errors import AmygdalaError
from .extraction import method

Acts = Float[Tensor, "texts hidden"]
Vectors = Float[Tensor, "concepts hidden"]


@method("mean")
def mean(acts: Acts, corpus: Corpus, *, seed: int = 0) -> Vectors:
    """The mean difference to as many negatives as there are positives, drawn with `seed`.

    `pooled` is the same against all negatives, and steadier for it.
    """
    return _aggregate(acts, corpus, seed, _library().mean_aggregator())


@method("pca")
def pca(acts: Acts, corpus: Corpus, *, seed: int = 0) -> Vectors:
    """The first principal component of +-(positive - negative), pairs drawn with `seed`.

    Both signs of each difference centre the data around 0 and keep the mean difference in it;
    centring the differences themselves, as sklearn's PCA does, would take it away.
    Source: Zou et al., arXiv 2310.01405 (representation engineering).
    """
    return _aggregate(acts, corpus, seed, _library().pca_aggregator())


@method("logistic")
def logistic(acts: Acts, corpus: Corpus, *, seed: int = 0) -> Vectors:
    """Weights of a logistic regression (L2) against as many negatives, drawn with `seed`."""
    # Residual streams are long vectors: the default of 100 steps stops short of the optimum.
    fit = _library().logistic_aggregator({"max_iter": 2000})

    def within_span(positives: Tensor, negatives: Tensor) -> Tensor:
        # The weights lie in the span of the texts, however the texts are turned: a few numbers a
        # text in place of thousands give the same weights many times faster.
        basis = torch.linalg.qr(torch.cat([positives, negatives]).T)[0]
        return basis @ fit(positives @ basis, negatives @ basis).to(basis)

    return _aggregate(acts, corpus, seed, within_span)


@method("logistic_l1")
def logistic_l1(acts: Acts, corpus: Corpus, *, seed: int = 0) -> Vectors:
    """Weights of a logistic regression with an L1 penalty: few dimensions carry all of it."""
    # liblinear visits dimensions in random order, and stops before that no longer matters.
    lasso = {"l1_ratio": 1.0, "solver": "liblinear", "random_state": seed}
    return _aggregate(acts, corpus, seed, _library().logistic_aggregator(lasso))


def _library():
    try:
        from steering_vectors import aggregators
    except ImportError as error:
        raise AmygdalaError(
            "this method needs steering-vectors: pip install --no-deps -r requirements-nodeps.txt"
        ) from error
    return aggregators


def _aggregate(
    acts: Acts, corpus: Corpus, seed: int, aggregator: Callable[[Tensor, Tensor], Tensor]
) -> Vectors:
    """The aggregator takes pairs: equal numbers of positives and negatives."""
    acts = acts - acts.mean(0)
    rows = []
    for concept in corpus.concepts:
        positives, negatives = corpus.positives(concept), corpus.negatives(concept)
        n = min(len(positives), len(negatives))
        # A stream of its own for each concept: another concept more or less changes no other.
        rng = np.random.default_rng([seed, *concept.encode()])
        pairs = rng.choice(positives, n, replace=False), rng.choice(negatives, n, replace=False)
        with warnings.catch_warnings():  # of the library's own doing, and the result is right
            warnings.filterwarnings("ignore", message="Creating a tensor from a list of numpy")
            rows.append(aggregator(*(acts[torch.from_numpy(np.sort(p))] for p in pairs)))
    return torch.stack(rows)
