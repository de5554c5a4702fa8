"""`pooled`: the difference of means, positives minus negatives."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .extraction import method


@method("pooled")
def pooled(acts: Float[Tensor, "texts hidden"], corpus: Corpus) -> Float[Tensor, "concepts hidden"]:
    """mean(positives) - mean(negatives) for every concept.

    Source: contrastive activation addition (Panickssery et al., arXiv 2312.06681).

    Every text that is not a positive of a concept is one of its negatives.
    """
    return mean_differences(acts, membership(corpus))


def mean_differences(
    acts: Float[Tensor, "texts inputs"], belongs: Float[Tensor, "concepts texts"]
) -> Float[Tensor, "concepts inputs"]:
    """Mean over a concept's texts minus mean over all others, from one sum over all texts."""
    # Centring first changes no difference, spares float32 the large mean that all texts share, and
    # leaves exactly nothing of a difference where they are all the same.
    acts, belongs = acts - acts.mean(0), belongs.to(acts)
    n_positives = belongs.sum(1, keepdim=True)
    positives = belongs @ acts
    negatives = acts.sum(0) - positives
    return positives / n_positives - negatives / (len(acts) - n_positives)


def membership(corpus: Corpus) -> Float[Tensor, "concepts texts"]:
    """1 where a text is a positive of a concept, 0 where it is one of its negatives."""
    belongs = torch.zeros(len(corpus.concepts), len(corpus.texts))
    for row, concept in enumerate(corpus.concepts):
        belongs[row, corpus.positives(concept)] = 1
    return belongs
