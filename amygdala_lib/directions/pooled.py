"""`pooled`: the difference of means, positives minus negatives."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .directions import method


@method("pooled")
def pooled(acts: Float[Tensor, "texts hidden"], corpus: Corpus) -> Float[Tensor, "concepts hidden"]:
    """mean(positives) - mean(negatives) for every concept.

    Source: contrastive activation addition (Panickssery et al., arXiv 2312.06681).

    Every text that is not a positive of a concept is one of its negatives, so the mean over
    negatives follows from the sum over all texts, whatever the number of concepts.
    """
    # Centring first changes no difference, spares float32 the large mean that all texts share, and
    # leaves exactly nothing of a difference where they are all the same.
    acts = acts - acts.mean(0)
    membership = torch.zeros(len(corpus.concepts), len(acts), dtype=acts.dtype, device=acts.device)
    for row, concept in enumerate(corpus.concepts):
        membership[row, corpus.positives(concept)] = 1
    n_positives = membership.sum(1, keepdim=True)
    positives = membership @ acts
    negatives = acts.sum(0) - positives
    return positives / n_positives - negatives / (len(acts) - n_positives)
