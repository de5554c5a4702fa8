"""How directions lie to one another: neighbours, and what the others already say."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def nearest(
    vectors: Float[Tensor, "concepts hidden"], count: int = 5
) -> tuple[Int[Tensor, "concepts count"], Float[Tensor, "concepts count"]]:
    """The rows with the largest cosine to each unit row, itself left out, and these cosines."""
    cosines = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    found = cosines.topk(min(count, len(vectors) - 1), dim=1)
    return found.indices, found.values


def combinations(
    vectors: Float[Tensor, "concepts hidden"], penalty: float = 0.01
) -> tuple[Float[Tensor, " concepts"], Float[Tensor, "concepts concepts"]]:
    """R^2 and weights of each unit row as a ridge combination of all the others.

    R^2 is high by construction where concepts share their negatives: the differences
    mu_c - mean of all, weighted by their numbers of texts, add up to nothing, so each is minus the
    sum of the others. `neighbour_r2` is what tells of redundancy then.

    Row c of the weights minimises ||v_c - sum_j w_j v_j||^2 + penalty ||w||^2 over j != c; there is
    no intercept, and R^2 is 1 - ||residual||^2. With A = V V^T + penalty I and B its inverse, the
    inverse of a matrix in blocks gives w_j = -B_cj / B_cc: one inverse serves all concepts.
    """
    # In float64: nearly equal directions make A nearly singular, and it is only concepts wide.
    gram = vectors.double() @ vectors.double().T
    inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))
    weights = (-inverse / inverse.diagonal()[:, None]).fill_diagonal_(0)
    # ||v_c - W_c V||^2 in terms of the cosines alone.
    residuals = gram.diagonal() - 2 * (weights * gram).sum(1) + (weights @ gram * weights).sum(1)
    return (1 - residuals / gram.diagonal()).float(), weights.float()


def neighbour_r2(
    vectors: Float[Tensor, "concepts hidden"], neighbours: Int[Tensor, "concepts count"]
) -> Float[Tensor, " concepts"]:
    """R^2 of each unit row as the best combination of a few others, the rows of `neighbours`.

    Above 0.9 a handful of other concepts says nearly all that this one does.
    """
    gram = vectors.double() @ vectors.double().T
    among = gram[neighbours[:, :, None], neighbours[:, None, :]]
    toward = gram.gather(1, neighbours)
    # Two neighbours may be the same direction: the pseudo-inverse takes them for one.
    weights = torch.linalg.pinv(among, hermitian=True, rtol=1e-6) @ toward[:, :, None]
    return ((weights[:, :, 0] * toward).sum(1) / gram.diagonal()).float()
