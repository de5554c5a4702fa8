"""`linear`: least squares, the weights that tell a concept's texts from all others."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .extraction import method
from .pooled import membership


@method("linear")
def linear(acts: Float[Tensor, "texts hidden"], corpus: Corpus) -> Float[Tensor, "concepts hidden"]:
    """The shortest w with w . x + b closest to +1 on positives and -1 on negatives.

    One decomposition serves all concepts. With fewer texts than dimensions the fit is exact, so
    the weights follow noise too: compare with `pooled` on held-out texts before trusting it.
    """
    # Singular values below float32's rounding of the largest are what the mean leaves of nothing.
    targets = membership(corpus).T.to(acts)
    centred, targets = acts - acts.mean(0), targets - targets.mean(0)
    return (torch.linalg.pinv(centred) @ (2 * targets)).T
