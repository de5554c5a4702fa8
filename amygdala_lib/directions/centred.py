"""`centred`: a concept's mean against all concepts', cleared of what neutral prose varies in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .extraction import method
from .pooled import membership


@method("centred")
def centred(
    acts: Float[Tensor, "texts hidden"],
    corpus: Corpus,
    *,
    neutral: Float[Tensor, "neutral hidden"],
    variance: float = 0.5,
) -> Float[Tensor, "concepts hidden"]:
    """mu_c - mean over concepts of mu_c', without the top principal components of neutral text.

    `neutral` are activations of prose without any concept; the fewest of its principal components
    that reach `variance` of its variance are projected out of every concept.

    Source: Sofroniew et al. 2026, Emotion concepts in a large language model.
    """
    acts, neutral = acts - acts.mean(0), neutral.float() - neutral.float().mean(0)
    belongs = membership(corpus).to(acts)
    means = belongs @ acts / belongs.sum(1, keepdim=True)
    _, singular_values, components = torch.linalg.svd(neutral, full_matrices=False)
    share = singular_values.square().cumsum(0) / singular_values.square().sum()
    components = components[: int((share < variance).sum()) + 1]
    contrasts = means - means.mean(0)
    return contrasts - contrasts @ components.T @ components
